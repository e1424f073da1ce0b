"""An error as each protocol writes it: one place for all routes, whoever found the error."""

from collections.abc import Callable, Mapping
from typing import Any

from function.errors import FunctionError

Shape = Callable[[FunctionError], dict[str, Any]]

OPENAI_PATHS = ("/v1/embeddings", "/v1/completions", "/v1/chat/completions")


def shape_of(path: str) -> Shape:
    """How errors are written at this path."""
    if path in OPENAI_PATHS:
        return openai
    return v2 if path == "/v2" or path.startswith("/v2/") else own


def own(error: FunctionError) -> dict[str, Any]:
    """Relight's own: for `/`, events, the V1 protocol and all else."""
    return {"error": {"type": error.type, "message": str(error)}}


def v2(error: FunctionError) -> dict[str, Any]:
    """The Open Inference Protocol's."""
    return {"error": str(error)}


def openai(error: FunctionError) -> dict[str, Any]:
    """OpenAI's."""
    said: Mapping[str, Any] = {"message": str(error), "type": "invalid_request_error" if error.status < 500 else "server_error"}
    return {"error": {**said, "param": error.param, "code": "model_not_found" if error.status == 404 else error.type}}
