"""LitServe: FastAPI in one process, the model in another, ZeroMQ between them; batches are made by the model's."""

import os
import sys
from typing import Any

import litserve  # type: ignore[import-not-found]
import orjson
from fastapi import Request, Response  # type: ignore[import-not-found]

from bench.serving_peers.agent import bring_up


class Predict(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self._agent = bring_up()

    def decode_request(self, request: Request) -> Any:  # it is handed the parsed body; the type makes it so
        return request["instances"][0]

    def batch(self, inputs: list[Any]) -> list[Any]:
        return list(inputs)

    def predict(self, x: list[Any]) -> Any:
        return self._agent.predict(x)

    def unbatch(self, output: Any) -> Any:
        return output

    def encode_response(self, output: Any) -> Response:
        return Response(orjson.dumps({"predictions": [output]}), media_type="application/json")


if __name__ == "__main__":
    api = Predict(max_batch_size=32, batch_timeout=float(os.environ["BENCH_WAIT_MS"]) / 1e3)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, log_level="warning", access_log=False, generate_client_file=False
    )
