"""mosec: a server in Rust in front of one Python process with the model; batches are made by the server."""

import os
from typing import Any

import orjson
from mosec import Server, Worker  # type: ignore[import-not-found]

from bench.serving_peers.agent import bring_up


class Predict(Worker):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self._agent = bring_up()

    def deserialize(self, data: bytes) -> Any:
        return orjson.loads(data)["instances"][0]

    def forward(self, data: list[Any]) -> Any:
        return self._agent.predict(data)

    def serialize(self, data: Any) -> bytes:
        return orjson.dumps({"predictions": [data]})


if __name__ == "__main__":
    server = Server()
    server.append_worker(Predict, num=1, max_batch_size=32, max_wait_time=int(os.environ["BENCH_WAIT_MS"]), timeout=30)
    server.run()
