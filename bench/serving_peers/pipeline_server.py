"""A pipeline of transformers behind FastAPI, as it is usually written: one call of it for each request, in uvicorn's pool of threads.

BENCH_WEIGHTS is the model's folder.
"""

import os
import sys
from typing import Any

import uvicorn  # type: ignore[import-not-found]
from fastapi import FastAPI  # type: ignore[import-not-found]
from pydantic import BaseModel
from transformers import pipeline

app = FastAPI()
classifier = pipeline("text-classification", model=os.environ["BENCH_WEIGHTS"], device="cpu")


class Instances(BaseModel):
    instances: list[str]


@app.post("/predict")  # type: ignore[untyped-decorator]
def predict(body: Instances) -> dict[str, Any]:
    return {"predictions": classifier(body.instances)}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
