"""The bodies of OpenAI's routes, in JSON Schema; they check a body, and `/openapi.json` describes it by them.

What a caller may say depends on the agent: see `completions` and `chat`.
"""

from collections.abc import Mapping
from typing import Any

from function.guarded_agent import Traits
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
    nullable = {name: {**schema, "type": _or_null(schema["type"])} if "type" in schema else schema for name, schema in optional.items()}
    return {"type": "object", "required": list(required), "properties": {**required, **nullable}, "additionalProperties": False}


def _or_null(kinds: str | list[str]) -> list[str]:
    return list(dict.fromkeys([*([kinds] if isinstance(kinds, str) else kinds), "null"]))


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
_CHOICES = {"n": _integer(1, 128)}
_ONE = _one_of(1, because="n says how many answers there are to a prompt, and none is chosen")
_NO_TOOLS = "this model's agent has no tools"
_NO_LOGPROBS = "this model's agent does not tell probabilities"

EMBEDDINGS = _body(
    required={"input": _TEXTS},
    optional={
        "encoding_format": _one_of("float", "base64"),
        "dimensions": _rule("the length of the model's vectors", type="integer", minimum=1),
        **_USER,
    },
)
_TEXT_PART = {"type": "object", "required": ["type", "text"], "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}}}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART, "minItems": 1}]}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": _CONTENT,
        "tool_calls": {"enum": [None, []]},
        "function_call": {"enum": [None]},
    },
}
_NAMED = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string", "minLength": 1}}}
_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": {"type": "string"},
        "type": {"enum": ["function"]},
        "function": {**_NAMED, "properties": {**_NAMED["properties"], "arguments": {"type": "string"}}},  # type: ignore[dict-item]
    },
}
_OF_TOOLS: tuple[Schema, ...] = (
    {
        "type": "object",
        "required": ["role", "tool_calls"],
        "properties": {
            "role": {"enum": ["assistant"]},
            "content": {"anyOf": [*_CONTENT["anyOf"], {"type": "null"}]},
            "tool_calls": {"type": "array", "items": _CALL, "minItems": 1},
            "function_call": {"enum": [None]},
        },
    },
    {
        "type": "object",
        "required": ["role", "content", "tool_call_id"],
        "properties": {"role": {"enum": ["tool"]}, "content": _CONTENT, "tool_call_id": {"type": "string"}},
    },
)
_TOOLS = _rule(
    'a list of objects like {"type": "function", "function": {"name": "weather", "parameters": {…}}}',
    type="array",
    items={"type": "object", "required": ["type", "function"], "properties": {"type": {"enum": ["function"]}, "function": _NAMED}},
)


def completions(traits: Traits) -> Schema:
    """The body of /v1/completions."""
    lack = traits.abilities.get("logprobs", _NO_LOGPROBS)
    return _body(
        required={"prompt": _TEXTS},
        optional={
            **_further(traits),
            **SAMPLING,
            **_STREAMING,
            **_USER,
            **_CHOICES,
            "best_of": _ONE,
            "echo": _one_of(False, because="the prompt is not repeated"),
            "logprobs": _one_of(because=lack) if lack else _integer(0, 20),
            "suffix": _one_of(because="text is made at the end only"),
        },
    ) | {
        "if": {"required": ["stream"], "properties": {"stream": {"enum": [True]}}},
        "then": {"properties": {"prompt": {"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 1}]}}},
    }


def chat(traits: Traits) -> Schema:
    """The body of /v1/chat/completions."""
    lacks = {name: traits.abilities.get(name, otherwise) for name, otherwise in _LACKING.items()}
    roles = "system, developer, user or assistant" if lacks["tools"] else "system, developer, user, assistant or tool"
    return _body(
        required={
            "messages": _rule(
                f'a list, not empty, of objects like {{"role": "user", "content": "Hello"}}; a role is {roles}, '
                'content a string or a list of {"type": "text", "text": …}',
                type="array",
                items=_MESSAGE if lacks["tools"] else {"anyOf": [_MESSAGE, *_OF_TOOLS]},
                minItems=1,
            )
        },
        optional={
            **_further(traits),
            **SAMPLING,
            "max_completion_tokens": SAMPLING["max_tokens"],
            **_STREAMING,
            **_USER,
            **_IGNORED,
            **_CHOICES,
            "modalities": _one_of(["text"], because="answers are text"),
            **_telling(lacks["logprobs"]),
            **_with_tools(lacks["tools"]),
            "response_format": _response_format(lacks["response_format"]),
            "functions": _one_of([], because="tools are said in 'tools'"),
            "function_call": _one_of("none", "auto", because="tools are said in 'tools'"),
        },
    ) | {
        "if": {"required": ["top_logprobs"], "properties": {"top_logprobs": {"type": "integer", "minimum": 1}}},
        "then": {"required": ["logprobs"], "properties": {"logprobs": {"enum": [True]}}},
    }


_LACKING = {
    "logprobs": _NO_LOGPROBS,
    "tools": _NO_TOOLS,
    "response_format": "answers are text, in no given form",
}


def _further(traits: Traits) -> dict[str, Schema]:
    """Parameters that the agent declares."""
    return {
        name: {"description": f"what its schema says: {dumps(schema).decode():.200}", **schema}
        for name, schema in traits.sampling_parameters.items()
    }


def _telling(lack: str) -> dict[str, Schema]:
    if lack:
        return {"logprobs": _one_of(False, because=lack), "top_logprobs": _one_of(0, because=lack)}
    return {"logprobs": _rule("a boolean", type="boolean"), "top_logprobs": _integer(0, 20)}


def _with_tools(lack: str) -> dict[str, Schema]:
    parallel = _rule("a boolean; it is ignored", type="boolean")
    if lack:
        choice = _one_of("none", "auto", because=lack)
        return {"tools": _one_of([], because=lack), "tool_choice": choice, "parallel_tool_calls": parallel}
    choice = _one_of("none", "auto", because="a call cannot be forced: the model writes what it likes")
    return {"tools": _TOOLS, "tool_choice": choice, "parallel_tool_calls": parallel}


def _response_format(lack: str) -> Schema:
    if lack:
        return _one_of({"type": "text"}, because=lack)
    kinds = {"type": {"enum": ["text", "json_object", "json_schema"]}}
    return _rule('an object like {"type": "json_object"}', type="object", required=["type"], properties=kinds)


class Bodies:
    """Of the routes that generate, for one agent."""

    def __init__(self, traits: Traits) -> None:
        self.traits = traits
        self.completions = completions(traits)
        self.chat = chat(traits)


_last = [Bodies(Traits())]


def bodies(traits: Traits) -> Bodies:
    """Made once for an agent, as there is one in a process."""
    if _last[0].traits is not traits:
        _last[0] = Bodies(traits)
    return _last[0]


def wrong_message(messages: Any, schema: Schema) -> str:
    """Which of the messages does not fit, and why: the beginning of what is said; empty if they are no list."""
    if not isinstance(messages, list):
        return ""
    if not messages:
        return "'messages' is empty: it"
    number = next((number for number, one in enumerate(messages) if not fits(one, schema["items"])), None)
    if number is None:
        return ""
    where, message = f"messages[{number}]", messages[number]
    if not isinstance(message, dict):
        return f"{where} is no object; 'messages'"
    roles = [role for one in schema["items"].get("anyOf", [schema["items"]]) for role in one["properties"]["role"]["enum"]]
    if message.get("role") not in roles:
        return f"{where} has the role {message.get('role')!r:.60}; 'messages'"
    content = message.get("content")
    for at, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            return f"{where} has content[{at}] of the type {kind!r:.60}, and this model takes text alone; 'messages'"
    if not fits(content, _CONTENT):
        return f"{where} has no 'content' that is a string or a list of texts; 'messages'"
    return f"{where} is not as it should be (its tool_calls, perhaps); 'messages'"


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
