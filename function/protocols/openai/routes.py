"""`/v1/embeddings`, `/v1/completions` and `/v1/chat/completions`."""

import base64
import struct
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import flask

from function.errors import BadInput, FunctionError
from function.guarded_agent import Usage, to_function_error
from function.http import Function, PredictRequest, event, events, reply
from function.merged import Merged
from function.protocols.openai.schemas import EMBEDDINGS, SAMPLING, UNSAID, Schema, bodies, fits, wrong_message
from function.protocols.openai.shapes import CHAT_SHAPE, TEXT_SHAPE, Shape, Told, usage
from function.told import has

_MOST_SEED = 2**63 - 1


def add_routes(app: flask.Flask, function: Function) -> None:
    """Add `/v1/embeddings`, `/v1/completions` and `/v1/chat/completions`."""

    @app.post("/v1/embeddings")
    def embeddings() -> flask.Response:
        body = _checked(function, EMBEDDINGS)
        wanted, abilities, context = body.get("dimensions"), function.model.traits.abilities, function.context()
        parameters = {"dimensions": wanted} if wanted and has(abilities, "dimensions") else None
        outputs = function.predict(PredictRequest(_texts(body["input"]), is_bare=False, parameters=parameters), context)
        vectors = [_vector(output) for output in outputs]
        if wanted not in (None, len(vectors[0])):
            raise _wrong("dimensions", f"'dimensions' must be {len(vectors[0])}, the length of the model's vectors, not {wanted}")
        encode = _base64 if body.get("encoding_format") == "base64" else lambda vector: vector
        data = [{"object": "embedding", "index": index, "embedding": encode(vector)} for index, vector in enumerate(vectors)]
        tokens = sum(int(size or 0) for size in context.sizes or ()) if has(abilities, "tokens") else 0  # of others nobody knows how many
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return reply({"object": "list", "data": data, "model": function.settings.model_name, "usage": used})

    @app.post("/v1/completions")
    def completions() -> flask.Response:
        body = _checked(function, bodies(function.model.traits).completions)
        said = _said(function, body)
        if "logprobs" in body:
            said |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        return _complete(function, body, [{"prompt": prompt, **said} for prompt in _texts(body["prompt"])], TEXT_SHAPE)

    @app.post("/v1/chat/completions")
    def chat() -> flask.Response:
        body = _checked(function, bodies(function.model.traits).chat)
        item = {"messages": [_message(message) for message in body["messages"]], **_said(function, body)}
        if body.get("logprobs"):
            item |= {"logprobs": True, "top_logprobs": body.get("top_logprobs", 0)}
        elif body.get("top_logprobs"):
            raise _wrong("top_logprobs", "'top_logprobs' must go with \"logprobs\": true")
        if body.get("tools") and body.get("tool_choice") != "none":
            item["tools"] = body["tools"]
        if body.get("response_format", {}).get("type", "text") != "text":
            item["response_format"] = body["response_format"]
        return _complete(function, body, [item], CHAT_SHAPE)


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
            wrong = wrong_message(value, rules[name]) if name == "messages" else ""
            raise _wrong(name, f"{wrong or repr(name)} must be {rules[name]['description']}")
    try:
        function.known(given["model"])
    except FunctionError as error:
        error.param = "model"
        raise
    return {name: int(value) if "integer" in rules[name].get("type", ()) else value for name, value in given.items()}


def _texts(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """What the agent is handed: role and text; `developer` is OpenAI's newer word for `system`, and parts of a text are its lines."""
    role, content = message["role"], message.get("content")
    text = "\n".join(part["text"] for part in content) if isinstance(content, list) else content or ""
    more = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name) and role in ("assistant", "tool")}
    return {"role": "system" if role == "developer" else role, "content": text, **more}


def _said(function: Function, body: Mapping[str, Any]) -> dict[str, Any]:
    """What the agent is handed of the parameters: those given; `stop` always as a list, `max_completion_tokens` as `max_tokens`."""
    names = dict.fromkeys((*SAMPLING, *function.model.traits.sampling_parameters))
    found = {name: body[name] for name in names if name in body and body[name] != UNSAID.get(name)}
    if "stop" in found:
        found["stop"] = _texts(found["stop"])
    if "max_completion_tokens" in body:
        found["max_tokens"] = body["max_completion_tokens"]
    return found


def _complete(function: Function, body: Mapping[str, Any], items: list[dict[str, Any]], shape: Shape) -> flask.Response:
    """body: checked. items: what the agent is handed, one for each prompt; n choices are made of each."""
    head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": body["model"], "system_fingerprint": None}
    count = body.get("n", 1)
    is_stream = bool(body.get("stream"))
    if is_stream and len(items) > 1:
        raise _wrong("prompt", "'prompt' must be one text with \"stream\": true; send a request for each")
    items = [_seeded(item, number) for item in items for number in range(count)]
    if len(items) > function.settings.max_inputs:
        what = "choices" if count > 1 else "prompts"
        raise BadInput(f"{len(items)} {what} in one request; at most {function.settings.max_inputs} (FUNCTION_MAX_INPUTS)")
    tells = "logprobs" in items[0] and function.model.traits.can_stream
    if is_stream:
        answer = _Streamed({**head, "object": shape.chunk}, shape, len(items), tells=tells)
        return answer.reply(function.merged(items), with_usage=body.get("stream_options", {}).get("include_usage", False))
    answers, usages = _answers(function, items)
    choices = [
        {
            "index": index,
            **shape.said(told),
            "logprobs": shape.logprobs(told.logprobs, 0) if tells else None,
            "finish_reason": used.finish_reason,
        }
        for index, (told, used) in enumerate(zip(answers, usages, strict=True))
    ]
    return reply({**head, "object": shape.whole, "choices": choices, "usage": usage(usages, count)})


def _seeded(item: dict[str, Any], number: int) -> dict[str, Any]:
    """For one of several choices, which are to differ: a seed of its own, if there is one."""
    if not number or "seed" not in item:
        return item
    seed = item["seed"] + number
    return {**item, "seed": seed if seed <= _MOST_SEED else item["seed"] - number}


def _answers(function: Function, items: list[dict[str, Any]]) -> tuple[list[Told], list[Usage]]:
    """One for each item, in one go. From an agent that streams, as it then tells more; all are made together.

    Raises TimedOut when that takes longer than the deadline.
    """
    if not function.model.traits.can_stream:
        outputs = function.predict(PredictRequest(items, is_bare=False))
        return [Told.of_piece(output) for output in outputs], [Usage()] * len(items)
    merged = function.merged(items)
    pieces = merged.whole('no whole answer within {} s; ask for fewer tokens, or with "stream": true')
    return [Told.of_pieces(some) for some in pieces], merged.usages


class _Streamed:
    """An answer in chunks, one or several choices of it."""

    def __init__(self, head: dict[str, Any], shape: Shape, count: int, *, tells: bool) -> None:
        """tells: whether there are logprobs."""
        self._head = head
        self._shape = shape
        self._tells = tells
        self._calls = [0] * count  # of tools, by choice, so far
        self._length = [0] * count  # of their tokens' texts
        self._more: dict[str, Any] = {}

    def reply(self, merged: Merged, *, with_usage: bool) -> flask.Response:
        """The response."""
        self._more = {"usage": None} if with_usage else {}
        indices: Sequence[int] = range(len(self._calls))

        def last() -> list[bytes]:
            chunks = [event(self._chunk(index, self._shape.ending, merged.usages[index].finish_reason)) for index in indices]
            if with_usage:
                chunks.append(event({**self._head, "choices": [], "usage": usage(merged.usages, len(merged.usages))}))
            return [*chunks, b"data: [DONE]\n\n"]

        first = [event(self._chunk(index, self._shape.first)) for index in indices] if self._shape.first else []
        return events(merged, lambda found: self._part(*found), last, first)

    def _part(self, index: int, piece: Any) -> dict[str, Any]:
        told = Told.of_piece(piece)
        logprobs = self._shape.logprobs(told.logprobs, self._length[index]) if self._tells else None
        self._length[index] += sum(len(token["token"]) for token in told.logprobs)
        choice = self._shape.part(told, self._calls[index])
        self._calls[index] += len(told.tool_calls)
        return self._chunk(index, choice, logprobs=logprobs)

    def _chunk(self, index: int, choice: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [{"index": index, **choice, "logprobs": logprobs, "finish_reason": finish_reason}],
            **self._more,
        }


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
