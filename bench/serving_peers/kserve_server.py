"""KServe's Python model server: the model is called in the event loop, one request at a time."""

import logging
from typing import Any

from kserve import Model, ModelServer  # type: ignore[import-not-found]

from bench.serving_peers.agent import bring_up


class Predict(Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__("model")
        self._agent = bring_up()
        self.ready = True

    def predict(self, payload: Any, headers: Any = None) -> Any:
        return {"predictions": self._agent.predict(payload["instances"])}


if __name__ == "__main__":
    server = ModelServer()
    for name in ("uvicorn.access", "kserve.trace"):  # two lines for each request otherwise
        logging.getLogger(name).setLevel(logging.WARNING)
    server.start([Predict()])
