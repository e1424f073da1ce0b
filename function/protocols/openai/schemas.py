"""The bodies of OpenAI's routes, in JSON Schema; they check a body, and `/openapi.json` describes it by them."""

from collections.abc import Mapping
from typing import Any

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
SAMPLING = {
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
UNSAID = {"stop": [], "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}
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
        **SAMPLING,
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
        **SAMPLING,
        "max_completion_tokens": SAMPLING["max_tokens"],
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
