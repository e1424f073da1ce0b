"""FastAPI under uvicorn, with uvloop and httptools: each request calls the model in a thread of its own, or in the event loop."""

import sys
from typing import Any

import orjson
import uvicorn  # type: ignore[import-not-found]
from fastapi import FastAPI, Request, Response  # type: ignore[import-not-found]
from pydantic import BaseModel

from bench.serving_peers.agent import bring_up

app = FastAPI()
agent = bring_up()


class Instances(BaseModel):
    instances: list[Any]


@app.post("/predict")  # type: ignore[untyped-decorator]
def predict(body: Instances) -> Response:
    return Response(orjson.dumps({"predictions": agent.predict(body.instances)}), media_type="application/json")


@app.post("/in-loop")  # type: ignore[untyped-decorator]
async def in_loop(request: Request) -> Response:
    """The leanest that it can be: neither a thread nor validation."""
    document = orjson.loads(await request.body())
    return Response(orjson.dumps({"predictions": agent.predict(document["instances"])}), media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
