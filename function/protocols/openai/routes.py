"""`/v1/embeddings`, `/v1/completions` and `/v1/chat/completions`."""

import base64
import struct
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

import flask

from function.errors import BadInput, FunctionError
from function.guarded_agent import to_function_error
from function.http import Function, PredictRequest, event, events, reply
from function.protocols.openai.schemas import CHAT, COMPLETIONS, EMBEDDINGS, SAMPLING, UNSAID, Schema, fits
from function.protocols.openai.shapes import CHAT_SHAPE, TEXT_SHAPE, Answer, Shape, text_of, usage
from function.streams import Stream


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/v1/embeddings`, `/v1/completions` and `/v1/chat/completions`."""

    @app.post("/v1/embeddings")
    def embeddings() -> flask.Response:
        body = _checked(function, EMBEDDINGS)
        vectors = [_vector(output) for output in function.predict(PredictRequest(_texts(body["input"]), is_bare=False))]
        wanted = body.get("dimensions")
        if wanted not in (None, len(vectors[0])):
            raise _wrong("dimensions", f"'dimensions' must be {len(vectors[0])}, the length of the model's vectors, not {wanted}")
        encode = _base64 if body.get("encoding_format") == "base64" else lambda vector: vector
        data = [{"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)]
        # An agent tells vectors only: nobody knows how many tokens they took.
        return reply(
            {"object": "list", "data": data, "model": function.settings.model_name, "usage": {"prompt_tokens": 0, "total_tokens": 0}}
        )

    @app.post("/v1/completions")
    def completions() -> flask.Response:
        body = _checked(function, COMPLETIONS)
        sampling = _sampling(body)
        return _complete(function, body, [{"prompt": prompt, **sampling} for prompt in _texts(body["prompt"])], TEXT_SHAPE)

    @app.post("/v1/chat/completions")
    def chat() -> flask.Response:
        body = _checked(function, CHAT)
        messages = [_message(message) for message in body["messages"]]
        return _complete(function, body, [{"messages": messages, **_sampling(body)}], CHAT_SHAPE)


def _wrong(name: str, message: str) -> BadInput:
    """For a parameter that is not what it should be."""
    error = BadInput(message)
    error.param = name
    return error


def _checked(function: Function, schema: Schema) -> dict[str, Any]:
    """The body's parameters, without those that are null. Raises BadInput, and NotFound for another model."""
    document = function.json_object()
    given = {name: value for name, value in document.items() if value is not None}
    rules: Mapping[str, Schema] = schema["properties"]
    for name in schema["required"]:
        if name not in given:
            raise _wrong(name, f"{name!r} is missing; it must be {rules[name]['description']}")
    for name, value in given.items():
        if name not in rules:
            raise _wrong(name, f"there is no parameter {name!r:.100} here")
        if not fits(value, rules[name]):
            raise _wrong(name, f"{name!r} must be {rules[name]['description']}")
    try:
        function.known(given["model"])
    except FunctionError as error:
        error.param = "model"
        raise
    return {name: int(value) if "integer" in rules[name].get("type", ()) else value for name, value in given.items()}


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _message(message: dict[str, Any]) -> dict[str, str]:
    """What the agent is handed: role and text; `developer` is OpenAI's newer word for `system`, and parts of a text are its lines."""
    role, content = message["role"], message["content"]
    text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": text}


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    """What the agent is handed of the parameters: those given; `stop` always as a list, `max_completion_tokens` as `max_tokens`."""
    found = {name: body[name] for name in SAMPLING if name in body and body[name] != UNSAID.get(name)}
    if "stop" in found:
        found["stop"] = _texts(found["stop"])
    if "max_completion_tokens" in body:
        found["max_tokens"] = body["max_completion_tokens"]
    return found


def _complete(function: Function, body: Mapping[str, Any], items: list[dict[str, Any]], shape: Shape) -> flask.Response:
    head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": body["model"], "system_fingerprint": None}
    if body.get("stream"):
        if len(items) > 1:
            raise _wrong("prompt", "'prompt' must be one text with \"stream\": true; send a request for each")
        options = body.get("stream_options", {})
        return _streamed(function.stream(items[0]), {**head, "object": shape.chunk}, shape, with_usage=options.get("include_usage", False))
    answers = _answers(function, items)
    choices = [
        {"index": index, **shape.said(answer.text), "logprobs": None, "finish_reason": answer.usage.finish_reason}
        for index, answer in enumerate(answers)
    ]
    return reply({**head, "object": shape.whole, "choices": choices, "usage": usage(answer.usage for answer in answers)})


def _answers(function: Function, items: list[dict[str, Any]]) -> list[Answer]:
    """One for each item, in one go. From an agent that streams, as it then tells more; all are made together.

    Raises TimedOut when that takes longer than the deadline.
    """
    if not function.model.traits.can_stream:
        return [Answer(text_of(output)) for output in function.predict(PredictRequest(items, is_bare=False))]
    if len(items) > function.settings.max_inputs:
        raise BadInput(f"{len(items)} prompts in one request; at most {function.settings.max_inputs} (FUNCTION_MAX_INPUTS)")
    late = 'no whole answer within {} s; ask for fewer tokens, or with "stream": true'
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(function.stream(item))) for item in items]
        return [Answer("".join(map(text_of, stream.whole(late))), stream.usage) for stream in streams]


def _streamed(stream: Stream, head: dict[str, Any], shape: Shape, *, with_usage: bool) -> flask.Response:
    def chunk(choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choices = [{"index": 0, **choice, "logprobs": None, "finish_reason": finish_reason}]
        return {**head, "choices": choices, **({"usage": None} if with_usage else {})}

    def last() -> list[bytes]:
        chunks = [event(chunk(shape.ending, stream.usage.finish_reason))]
        if with_usage:
            chunks.append(event({**head, "choices": [], "usage": usage([stream.usage])}))
        return [*chunks, b"data: [DONE]\n\n"]

    first = [event(chunk(shape.first))] if shape.first else []
    return events(stream, lambda piece: chunk(shape.part(text_of(piece))), last, first)


def _vector(output: Any) -> Any:
    """The numbers of an output, a list or an array of one dimension. Raises BadInput for the output of an agent that does not embed."""
    is_vector = output.ndim == 1 if hasattr(output, "ndim") else isinstance(output, list) and {int, float}.issuperset(map(type, output))
    if not is_vector or len(output) == 0:
        raise BadInput("this model does not embed text: its outputs are no lists of numbers")
    return output


def _base64(vector: Any) -> str:
    """Little-endian float32. Raises AgentFailed for numbers that are beyond it."""
    try:
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    except (OverflowError, struct.error) as error:
        raise to_function_error(error) from error
