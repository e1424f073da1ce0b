"""What OpenAI's clients speak: embeddings, completions and chat completions, in one go or as server-sent events.

Sampling parameters are handed to the agent; parameters that ask for something else are refused rather than ignored, unless they ask for
what happens anyway (`n: 1`). The schemas that check a body here also describe it in `/openapi.json`.
"""

import base64
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import flask

from function.errors import BadInput, FunctionError
from function.guarded_agent import Usage, to_function_error
from function.http import Function, PredictRequest, event, events, reply
from function.streams import Stream
from function.values import dumps

Schema = dict[str, Any]


# The bodies, in JSON Schema; `description` completes "'name' must be …"


def _rule(says: str, **schema: Any) -> Schema:
    return {"description": says, **schema}


def _number(low: float, high: float) -> Schema:
    return _rule(f"a number from {low:g} to {high:g}", type="number", minimum=low, maximum=high)


def _integer(low: int, high: int) -> Schema:
    return _rule(f"a whole number from {low} to {high}", type="integer", minimum=low, maximum=high)


def _one_of(*values: Any, because: str = "") -> Schema:
    says = " or ".join(dumps(value).decode() for value in (*values, None))
    return _rule(f"{says} ({because})" if because else says, enum=[*values, None])


def _body(*, required: Mapping[str, Schema], optional: Mapping[str, Schema]) -> Schema:
    """Optional parameters may be null."""
    required = {"model": _rule("the model's name", type="string"), **required}
    nullable = {name: {**schema, "type": [schema["type"], "null"]} if "type" in schema else schema for name, schema in optional.items()}
    return {"type": "object", "required": list(required), "properties": {**required, **nullable}, "additionalProperties": False}


_TEXTS = _rule(
    "a string or a list of strings, at least one; token numbers are not understood here",
    anyOf=[{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}],
)
_SAMPLING = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "seed": _integer(1 - 2**63, 2**63 - 1),
    "max_tokens": _integer(1, 2**31 - 1),
    "stop": _rule(
        "a string or a list of up to 4 strings, none of them empty",
        anyOf=[
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            {"type": "null"},
        ],
    ),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _rule("an object: a number from -100 to 100 for each token", type="object", additionalProperties=_number(-100, 100)),
}
# Defaults that are not handed on, as some clients always send them and few agents know of them.
_UNSAID = {"stop": [], "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
_STREAMING = {
    "stream": _rule("a boolean", type="boolean"),
    "stream_options": _rule(
        'an object like {"include_usage": true}',
        type="object",
        properties={"include_usage": {"type": "boolean"}, "include_obfuscation": {"type": "boolean"}},
        additionalProperties=False,
    ),
}
_IGNORED = {
    name: _rule("anything; it is ignored") for name in ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store")
}
_USER = {"user": _rule("a string; it is ignored", type="string")}
_ONE = _one_of(1, because="there is one answer to a prompt")
_NO_TOOLS = "there are no tools"

EMBEDDINGS = _body(
    required={"input": _TEXTS},
    optional={
        "encoding_format": _one_of("float", "base64"),
        "dimensions": _rule("the length of the model's vectors", type="integer", minimum=1),
        **_USER,
    },
)
COMPLETIONS = _body(
    required={"prompt": _TEXTS},
    optional={
        **_SAMPLING,
        **_STREAMING,
        **_USER,
        "n": _ONE,
        "best_of": _ONE,
        "echo": _one_of(False, because="the prompt is not repeated"),
        "logprobs": _one_of(because="probabilities are not told"),
        "suffix": _one_of(because="text is made at the end only"),
    },
) | {
    "if": {"required": ["stream"], "properties": {"stream": {"enum": [True]}}},
    "then": {"properties": {"prompt": {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 1}]}}},
}
_TEXT_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}}}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]},
        "tool_calls": {"enum": [None, []]},
        "function_call": {"enum": [None]},
    },
}
CHAT = _body(
    required={
        "messages": _rule(
            'a list, not empty, of objects like {"role": "user", "content": "Hello"}; a role is system, developer, user or assistant, '
            'content a string or a list of {"type": "text", "text": …}',
            type="array",
            items=_MESSAGE,
            minItems=1,
        )
    },
    optional={
        **_SAMPLING,
        "max_completion_tokens": _SAMPLING["max_tokens"],
        **_STREAMING,
        **_USER,
        **_IGNORED,
        "parallel_tool_calls": _rule("a boolean; it is ignored", type="boolean"),
        "n": _ONE,
        "logprobs": _one_of(False, because="probabilities are not told"),
        "top_logprobs": _one_of(0, because="probabilities are not told"),
        "modalities": _one_of(["text"], because="answers are text"),
        "response_format": _one_of({"type": "text"}, because="answers are text, in no given form"),
        "tools": _one_of([], because=_NO_TOOLS),
        "tool_choice": _one_of("none", "auto", because=_NO_TOOLS),
        "functions": _one_of([], because=_NO_TOOLS),
        "function_call": _one_of("none", "auto", because=_NO_TOOLS),
    },
)

_TYPES = {"array": list, "boolean": bool, "integer": int, "null": type(None), "number": int | float, "object": dict, "string": str}


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value is what a schema says, of the keywords that are used here."""
    if "enum" in schema:
        return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in schema["enum"])
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    kinds = schema.get("type", ())
    if kinds and not any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    match value:
        case str():
            return bool(len(value) >= schema.get("minLength", 0))
        case int() | float():
            return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
        case list():
            is_long_enough = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
            return is_long_enough and all(fits(item, schema.get("items", {})) for item in value)
        case dict():
            known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
            return all(name in value for name in schema.get("required", ())) and all(
                fits(item, known[name]) if name in known else others is not False and fits(item, others) for name, item in value.items()
            )
    return True


def _is(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # JSON knows no difference
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


# What an answer looks like


@dataclass(frozen=True)
class Shape:
    """How completions and chat completions differ in what they answer."""

    prefix: str  # of ids
    whole: str  # the `object` of an answer in one go
    chunk: str  # and of a part of one
    said: Callable[[str], dict[str, Any]]  # what a choice holds of a text
    part: Callable[[str], dict[str, Any]]  # and of a piece of it
    first: dict[str, Any] | None  # what a choice holds in a chunk before the first piece, if there is to be one
    ending: dict[str, Any]  # and in the one after the last


TEXT_SHAPE = Shape(
    "cmpl-", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}, None, {"text": ""}
)
CHAT_SHAPE = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text}},
    {"delta": {"role": "assistant", "content": ""}},
    {"delta": {}},
)


@dataclass(frozen=True)
class Answer:
    """One choice."""

    text: str
    usage: Usage = field(default_factory=Usage)


def usage(answers: Iterable[Usage]) -> dict[str, int]:
    """What all of them took together."""
    found = list(answers)
    prompt, completion = sum(one.prompt_tokens for one in found), sum(one.completion_tokens for one in found)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def text_of(output: Any) -> str:
    """An agent's output as text: itself, bytes that are UTF-8, or in JSON what is neither."""
    if isinstance(output, bytes):
        try:
            return output.decode()
        except UnicodeDecodeError:
            pass
    return output if isinstance(output, str) else dumps(output).decode()


# The routes


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
    found = {name: body[name] for name in _SAMPLING if name in body and body[name] != _UNSAID.get(name)}
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
