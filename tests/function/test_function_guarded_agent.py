"""Whatever an agent gives, raises or does ends its own request at most: the process goes on, and everybody else is answered."""

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from function.agent import Weights
from function.batcher import CallContext
from function.errors import AgentFailed, BadInput, ClientGone, Unavailable
from function.guarded_agent import GuardedAgent, Traits, Usage
from function.model import Model
from function.priority import Priority
from function.settings import FunctionSettings
from tests.support import BIN, Server, clean_environment, free_port, request, running, wait_until
from weights_cache.settings import WeightsSettings

AGENT = """
import asyncio, collections, os
import numpy, torch
from function import errors
from function.agent import BadInput

class Odd:
    # Does what its input says, in Python.

    def load(self, weights, device): pass

    def predict(self, inputs):
        if inputs == ["who are you"]:
            return [os.getpid()]
        return run(inputs[0], inputs=inputs)["found"]

    def stream(self, input):
        return run(input["text_input"])["found"]

def run(code, **names):
    scope = {**globals(), **names}
    exec(code, scope)
    return scope
"""
FAILED = "the model failed on this request; the function's log says why"
UNSAID = "the agent refuses this, without a reason that can be told"
PREDICT, STREAM = "/v1/models/m:predict", "/v2/models/m/generate_stream"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("odd"), free_port()
    (folder / "odd_agent.py").write_text(AGENT)
    env = clean_environment(PYTHONPATH=str(folder), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT="odd_agent:Odd")
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env | {"FUNCTION_MODEL_NAME": "m"}, port) as found:
        yield found.ready()


@pytest.fixture
def server(process: Server) -> Iterator[Server]:
    """The same process for all of these tests; after each it answers the next request."""

    def pid() -> Any:
        return request(process.port, "POST", PREDICT, {"instances": ["who are you"]}).json()

    before = pid()
    yield process
    assert pid() == before
    assert request(process.port, "GET", "/healthz").status == 200


def said_since(server: Server, before: str) -> str:
    """What the log has got since then."""
    return server.said()[len(before) :]


# What predict gives

LYING = "class L(list):\n def __len__(self): return 99\nfound = L(['a'])"
SPEECHLESS = "class L(list):\n def __len__(self): raise OSError('no')\nfound = L(['a'])"
TAKEN = [
    pytest.param("found = ['a']", ["a"], id="a list"),
    pytest.param("found = ('a',)", ["a"], id="a tuple"),
    pytest.param("found = collections.deque(['a'])", ["a"], id="a deque"),
    pytest.param("found = {'k': 'a'}.values()", ["a"], id="values of a dict"),
    pytest.param("found = (item for item in ['a'])", ["a"], id="a generator"),
    pytest.param("found = map(str, [1])", ["1"], id="a map"),
    pytest.param("found = numpy.array([[1, 2]])", [[1, 2]], id="an array"),
    pytest.param("found = torch.tensor([[1.5]])", [[1.5]], id="a tensor"),
    pytest.param(LYING, ["a"], id="a list that lies about its length"),
    pytest.param(SPEECHLESS, ["a"], id="a list whose length raises"),
    pytest.param("found = []\nwhile inputs: found.append(len(inputs.pop()) > 0)", [True], id="inputs that are used up"),
]


@pytest.mark.parametrize(("code", "outputs"), TAKEN)
def test_what_can_be_made_a_list_is_taken(server: Server, code: str, outputs: list[Any]) -> None:
    reply = request(server.port, "POST", PREDICT, {"instances": [code]})
    assert (reply.status, reply.json()) == (200, {"predictions": outputs})


NO_LIST = [
    pytest.param("found = {'predictions': ['a']}", "predict returned a dict, not a list of 1 output", id="a dict"),
    pytest.param("found = 'a'", "predict returned a str, not a list of 1 output", id="a text"),
    pytest.param("found = b'a'", "predict returned a bytes, not a list of 1 output", id="bytes"),
    pytest.param("found = None", "predict returned NoneType, not a list of 1 output", id="nothing"),
    pytest.param("found = {'a'}", "predict returned a set, not a list of 1 output", id="a set"),
    pytest.param("found = {'a': 1}.keys()", "predict returned a dict_keys, not a list of 1 output", id="keys of a dict"),
    pytest.param("found = 1", "predict returned an int, not a list of 1 output", id="a number"),
    pytest.param("found = torch.tensor(1.0)", "predict returned a Tensor, not a list of 1 output", id="a tensor of no dimension"),
    pytest.param("found = list", "TypeError", id="a class"),
    pytest.param("async def later(): pass\nfound = later()", "predict returned a coroutine, not a list of 1 output", id="a coroutine"),
    pytest.param("found = []", "predict returned 0 outputs, not a list of 1 output", id="too few"),
    pytest.param("found = ['a', 'b']", "predict returned 2 outputs, not a list of 1 output", id="too many"),
    pytest.param("found = (n for n in range(0))", "predict returned 0 outputs, not a list of 1 output", id="a generator of nothing"),
    pytest.param("import itertools\nfound = itertools.count()", "predict returned more than 1 outputs, not a list of 1", id="no end"),
    pytest.param("inputs.clear()\nfound = []", "predict returned 0 outputs, not a list of 1 output", id="fewer inputs"),
    pytest.param("inputs.append(7)\nfound = inputs", "predict returned 2 outputs, not a list of 1 output", id="more inputs"),
    pytest.param("class O:\n def __iter__(self): raise OSError('no way')\nfound = O()", "OSError: no way", id="__iter__ raises"),
    pytest.param("class L(list):\n def __iter__(self): exit(3)\nfound = L('a')", "SystemExit: 3", id="a list's __iter__ exits"),
    pytest.param("class O:\n def __getattr__(self, name): raise OSError(name)\nfound = O()", "OSError: shape", id="attributes raise"),
    pytest.param("def g():\n yield 'a'\n raise OSError('half-way')\nfound = g()", "OSError: half-way", id="a generator that raises"),
    pytest.param("found = [object()]", "output[0] is of type object, which JSON cannot hold", id="what JSON cannot hold"),
]


@pytest.mark.parametrize(("code", "reason"), NO_LIST)
def test_what_is_no_list_of_outputs_fails_this_request_and_the_log_says_why(server: Server, code: str, reason: str) -> None:
    before = server.said()
    reply = request(server.port, "POST", PREDICT, {"instances": [code]})
    assert (reply.status, reply.json()) == (500, {"error": {"type": "agent_failed", "message": FAILED}})
    assert reason in wait_until("the reason", lambda: said_since(server, before) or None)


# What predict raises

RAISED = [
    "raise RuntimeError('secret')",
    "exit('secret')",
    "raise SystemExit(0)",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "raise MemoryError",
    "def f(): f()\nf()",
    "raise StopIteration('secret')",
    "raise StopAsyncIteration",
    "raise asyncio.CancelledError",
    "raise BaseException('secret')",
    "raise ExceptionGroup('secret', [OSError(), BadInput('secret')])",
    "class E(Exception):\n def __str__(self): raise OSError('secret')\nraise E",
    "class E(Exception):\n def __str__(self): exit(3)\nraise E",
    "class E(Exception):\n def __str__(self): return 7\nraise E",
    "class E(Exception):\n def __repr__(self): raise OSError\n __str__ = __repr__\nraise E from E()",
    "class E(Exception):\n @property\n def __class__(self): raise OSError('secret')\nraise E",
    "class E(Exception):\n @property\n def __notes__(self): exit(3)\nraise E",
    "class E(BaseException):\n def __getattribute__(self, name): exit(3)\nraise E",
    "error = OSError('secret')\nerror.__cause__ = OSError()\nerror.__cause__.__cause__ = error\nraise error",
    "raise errors.AgentFailed('secret')",
    "raise errors.TimedOut('secret')",
    "raise errors.ClientGone('secret')",
    "raise errors.Unauthorized('secret')",
    "raise errors.HttpError(200, 'secret', 'secret')",
    "raise errors.FunctionError('secret')",
    "syntax error",
]


@pytest.mark.parametrize("code", RAISED)
def test_whatever_is_raised_fails_this_request_alone_and_is_logged(server: Server, code: str) -> None:
    before = server.said()
    reply = request(server.port, "POST", PREDICT, {"instances": [code]})
    assert (reply.status, reply.json()) == (500, {"error": {"type": "agent_failed", "message": FAILED}})
    wait_until("the log", lambda: re.search("the agent failed|a message cannot be written", said_since(server, before)))


ODD_KIND = """
class Mine(BadInput):
    __module__ = 'function.errors'
    def __init__(self, one, two): super().__init__(f'{one} and {two}')
raise Mine('a', 'b')
"""
REFUSED = [
    pytest.param("raise BadInput('too long')", 400, "too long", id="a text"),
    pytest.param("raise BadInput", 400, UNSAID, id="none"),
    pytest.param("raise BadInput('')", 400, UNSAID, id="an empty one"),
    pytest.param("raise BadInput({'a': 1})", 400, "{'a': 1}", id="a dict"),
    pytest.param("raise BadInput(b'a')", 400, "b'a'", id="bytes"),
    pytest.param("raise BadInput('a', 2)", 400, "('a', 2)", id="several"),
    pytest.param("raise BadInput('a' * 10**6)", 400, f"{'a' * 500} … {'a' * 500}", id="a megabyte"),
    pytest.param("raise BadInput('half \\ud800')", 400, "half \\ud800", id="half a character"),
    pytest.param("class E(BadInput):\n def __str__(self): raise OSError\nraise E('a')", 400, UNSAID, id="a text that raises"),
    pytest.param("class E(BadInput):\n def __str__(self): exit(3)\nraise E('a')", 400, UNSAID, id="a text that exits"),
    pytest.param("class E(BadInput):\n def __str__(self): return 7\nraise E('a')", 400, UNSAID, id="a text that is none"),
    pytest.param("class E(BadInput): pass\nraise E('mine')", 400, "mine", id="of its own kind"),
    pytest.param("class E(BadInput, KeyError): pass\nraise E('mine')", 400, "'mine'", id="of two kinds"),
    pytest.param(ODD_KIND, 400, "a and b", id="a kind that says that it is ours"),
    pytest.param("raise errors.CannotStream('no')", 400, "no", id="CannotStream"),
    pytest.param("raise errors.NotFound('no such voice')", 404, "no such voice", id="NotFound"),
    pytest.param("raise errors.Forbidden('not you')", 403, "not you", id="Forbidden"),
    pytest.param("raise errors.TooLarge('too large')", 413, "too large", id="TooLarge"),
    pytest.param("raise errors.UnsupportedMediaType('what')", 415, "what", id="UnsupportedMediaType"),
]


@pytest.mark.parametrize(("code", "status", "message"), REFUSED)
def test_what_an_agent_refuses_is_told_in_its_words_as_far_as_they_are_some(server: Server, code: str, status: int, message: str) -> None:
    reply = request(server.port, "POST", PREDICT, {"instances": [code]})
    assert (reply.status, reply.json()["error"]["message"]) == (status, message)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [("7", "7"), ("0.2", "1"), ("-1", "1"), ("float('nan')", "1"), ("float('inf')", "1"), ("10**400", "1"), ("'soon'", "1"), ("None", "1")],
)
def test_an_agent_may_ask_to_come_again_after_some_seconds(server: Server, seconds: str, told: str) -> None:
    reply = request(server.port, "POST", PREDICT, {"instances": [f"raise errors.Unavailable('busy', {seconds})"]})
    assert (reply.status, reply.headers["retry-after"], reply.json()["error"]["message"]) == (503, told, "busy")


# Streams over HTTP: their clean-up, when the caller leaves

ENDLESS = "def pieces():\n try:\n  while True: yield 'a '\n {clean_up}\nfound = pieces()"
OBJECT = "class Pieces:\n def __iter__(self): return self\n def __next__(self): return 'a '\n {close}\nfound = Pieces()"
CLEAN_UP = [
    pytest.param(ENDLESS.format(clean_up="finally: {}['session']"), "KeyError: 'session'", id="raises"),
    pytest.param(ENDLESS.format(clean_up="finally: exit(3)"), "SystemExit: 3", id="exits"),
    pytest.param(ENDLESS.format(clean_up="except BaseException: yield 'aborted'"), "generator ignored GeneratorExit", id="goes on"),
    pytest.param(OBJECT.format(close="def close(self): raise OSError('still open')"), "OSError: still open", id="a method that raises"),
    pytest.param(OBJECT.format(close="close = 7"), "TypeError: 'int' object is not callable", id="no method"),
    pytest.param(OBJECT.format(close="close = property(lambda self: {}['close'])"), "KeyError: 'close'", id="an attribute that raises"),
]


@pytest.mark.parametrize(("code", "reason"), CLEAN_UP)
def test_a_stream_whose_clean_up_fails_is_forgotten_when_its_caller_leaves(server: Server, code: str, reason: str) -> None:
    before = server.said()
    leave_after_the_first_piece(server, code)
    wait_until("its place is free", lambda: b'function_active_streams{model="m"} 0.0' in request(server.port, "GET", "/metrics").body)
    wait_until("the log", lambda: reason in said_since(server, before))
    assert request(server.port, "POST", PREDICT, {"instances": ["found = ['it goes on']"]}).status == 200
    assert said_since(server, before).count(reason) == 1


def leave_after_the_first_piece(server: Server, code: str) -> None:
    from http.client import HTTPConnection

    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", STREAM, json.dumps({"text_input": code}), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert b'"a "' in reply.readline()
    reply.close()
    connection.close()


JUNK = [
    pytest.param("found = ['a', object(), 'b']", "is of type object, which JSON cannot hold", id="an object"),
    pytest.param("found = ['a', 'half \\ud800']", "is a string with a lone surrogate", id="half a character"),
    pytest.param("found = ['a', {1, object()}]", "is of type object, which JSON cannot hold", id="a set"),
    pytest.param("found = ['a', 2**70]", "is an integer beyond 64 bits", id="a large number"),
    pytest.param("def f():\n yield 'a'\n exit(3)\nfound = f()", "SystemExit: 3", id="an exit"),
    pytest.param("def f():\n yield 'a'\n raise StopIteration\nfound = f()", "generator raised StopIteration", id="an end that is none"),
]


@pytest.mark.parametrize(("code", "reason"), JUNK)
def test_a_stream_that_gives_junk_ends_with_an_error(server: Server, code: str, reason: str) -> None:
    before = server.said()
    events = request(server.port, "POST", STREAM, {"text_input": code}).body.decode()
    assert '"a"' in events
    assert FAILED in events
    assert reason in said_since(server, before)


@pytest.mark.parametrize("code", ["found = None", "found = 7", "exit(3)", "class O:\n def __iter__(self): return 7\nfound = O()"])
def test_what_is_no_stream_is_an_error_before_anything_is_streamed(server: Server, code: str) -> None:
    assert request(server.port, "POST", STREAM, {"text_input": code}).status == 500


# In this process: sequences that share steps, what hangs, and the end


class Scripted:
    """Its methods are what a test wants them to be."""

    script: ClassVar[dict[str, Callable[..., Any]]] = {}

    def load(self, weights: Weights, device: str) -> None:
        self._do("load", None)

    def predict(self, inputs: Sequence[Any]) -> Any:
        return self._do("predict", inputs, inputs)

    def close(self) -> None:
        self._do("close", None)

    def _do(self, name: str, default: Any, *arguments: Any) -> Any:
        method = self.script.get(name)
        return method(*arguments) if method else default


class Stepping(Scripted):
    def start(self, input: Any) -> Any:
        return self._do("start", input, input)

    def step(self, sequences: Any) -> Any:
        return self._do("step", None, sequences)


class Streaming(Scripted):
    def stream(self, input: Any) -> Any:
        return self._do("stream", None, input)


class WithParameters(Scripted):
    def predict(self, inputs: Sequence[Any], parameters: dict[str, Any] | None = None) -> Any:
        return self._do("predict", inputs, inputs, parameters)


MakeModel = Callable[..., Model]


@pytest.fixture
def make_model(tmp_path: Path) -> Iterator[MakeModel]:
    ended: list[BaseException] = []

    def make(agent: type[Scripted], *, wait: bool = True, settings: dict[str, Any] | None = None, **script: Callable[..., Any]) -> Model:
        Scripted.script = script
        found = FunctionSettings(agent=f"{__name__}:{agent.__name__}", **(settings or {}))
        model = Model(found, Weights(WeightsSettings(cache_dir=tmp_path)), started_at=time.monotonic())
        model.start(on_failure=ended.append)
        if wait:
            wait_until("ready", lambda: model.phase == "ready")
        return model

    yield make
    assert not ended  # the model's thread


def ask(**more: Any) -> CallContext:
    return CallContext(100, **more)


def answers(model: Model) -> None:
    """It goes on."""
    Scripted.script = {}
    assert model.predict(["next"], ask()) == ["next"]


class Counting:
    """An answer of so many pieces; what it tells and what becomes of it is noted."""

    def __init__(self, pieces: Sequence[Any], **told: Any) -> None:
        self.pieces = deque(pieces)
        self.closed = 0
        vars(self).update(told)

    def __iter__(self) -> "Counting":
        return self

    def __next__(self) -> Any:
        if not self.pieces:
            raise StopIteration
        piece = self.pieces.popleft()
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def close(self) -> None:
        self.closed += 1


def step(sequences: Sequence[Counting]) -> list[Any]:
    return [next(sequence, None) for sequence in sequences]


@pytest.mark.parametrize("agent", [Stepping, Streaming])
@pytest.mark.parametrize("end", ["its own", "an error", "junk", "the caller leaves", "the function ends"])
def test_a_sequence_is_closed_once_however_it_ends(make_model: MakeModel, agent: type[Scripted], end: str) -> None:
    model = make_model(agent, start=lambda made: made, stream=lambda made: made, step=step)
    last: dict[str, list[Any]] = {"its own": [], "an error": [OSError("broken")], "junk": [object()]}
    made = Counting(["a", *last.get(end, ["b"] * 10**5)])
    stream = model.stream(made, ask())
    if end == "the caller leaves":
        stream.close()
    elif end == "the function ends":
        assert model.close(100)
    with pytest.raises((AgentFailed, ClientGone, Unavailable)) if end != "its own" else nothing():
        list(stream.pieces())
    wait_until("its place is free", lambda: not model.active_streams())
    wait_until("it is closed", lambda: made.closed)
    if end != "the function ends":
        answers(model)
    assert made.closed == 1


class nothing:  # noqa: N801  stands where `pytest.raises` does
    """Nothing is raised."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Rude(Counting):
    """Whoever asks at its end how it went hears of it."""

    @property
    def prompt_tokens(self) -> int:
        if not self.pieces:
            raise OSError("ask somebody else")
        return 1


@pytest.mark.parametrize(
    "culprit",
    [
        pytest.param(lambda: Counting(["x", "y", object()]), id="a piece that JSON cannot hold"),
        pytest.param(lambda: Counting(["x", "y", "\ud800"]), id="half a character"),
        pytest.param(lambda: Rude(["x", "y", "z"]), id="an attribute that raises"),
    ],
)
def test_what_one_sequence_gives_makes_no_step_run_twice(make_model: MakeModel, culprit: Callable[[], Counting]) -> None:
    together, gate = [], threading.Event()

    def gated_step(sequences: Sequence[Counting]) -> list[Any]:
        gate.wait(100)
        together.append(len(sequences))
        return step(sequences)

    model = make_model(Stepping, step=gated_step)
    wanted = list(range(6))
    replies: list[list[Any]] = []

    def read(made: Counting) -> None:
        try:
            replies.append(list(model.stream(made, ask()).pieces()))
        except AgentFailed:
            replies.append(["failed"])

    threads = [threading.Thread(target=read, args=(made,)) for made in (Counting(wanted), culprit(), Counting(wanted))]
    for thread in threads:
        thread.start()
    wait_until("all are there", lambda: model.batcher.waiting() + model.active_streams() == 3)
    gate.set()
    for thread in threads:
        thread.join()
    assert sorted(replies, key=len) == [["failed"], wanted, wanted]
    assert 3 in together
    answers(model)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda pieces: None, id="nothing"),
        pytest.param(lambda pieces: dict(enumerate(pieces)), id="a dict"),
        pytest.param(lambda pieces: "a", id="a text"),
        pytest.param(lambda pieces: [], id="too few"),
        pytest.param(lambda pieces: [*pieces, "b"], id="too many"),
        pytest.param(lambda pieces: 7, id="a number"),
    ],
)
def test_a_step_that_gives_no_list_of_pieces_fails(make_model: MakeModel, given: Callable[[list[Any]], Any]) -> None:
    model = make_model(Stepping, step=lambda sequences: given(step(sequences)))
    with pytest.raises(AgentFailed):
        list(model.stream(Counting(["a"]), ask()).pieces())
    answers(model)


@pytest.mark.parametrize("given", [tuple, deque, iter, np.array])
def test_what_can_be_made_a_list_of_pieces_is_taken(make_model: MakeModel, given: Callable[[list[Any]], Any]) -> None:
    model = make_model(Stepping, step=lambda sequences: given([*step(sequences)]) if sequences[0].pieces else [None])
    assert list(model.stream(Counting([1, 2, 3]), ask()).pieces()) == [1, 2, 3]


class Text(str):
    """Which is not what it says."""

    def __str__(self) -> str:
        raise OSError("no text")


@pytest.mark.parametrize(
    ("told", "usage"),
    [
        pytest.param({}, Usage(), id="nothing"),
        pytest.param({"prompt_tokens": 3, "completion_tokens": 4, "finish_reason": "length"}, Usage(3, 4, "length"), id="all"),
        pytest.param({"prompt_tokens": -1, "completion_tokens": "7", "finish_reason": 7}, Usage(), id="what it is not"),
        pytest.param({"prompt_tokens": 2**63, "completion_tokens": 1.5, "finish_reason": ""}, Usage(), id="too large"),
        pytest.param({"prompt_tokens": True, "finish_reason": Text("length")}, Usage(1, 0, "length"), id="like it"),
        pytest.param({"finish_reason": "\ud800"}, Usage(0, 0, "\\ud800"), id="half a character"),
        pytest.param({"finish_reason": "a" * 10**6}, Usage(0, 0, f"{'a' * 50} … {'a' * 50}"), id="a megabyte"),
    ],
)
def test_what_a_sequence_tells_is_plain_whatever_it_is(make_model: MakeModel, told: dict[str, Any], usage: Usage) -> None:
    stream = make_model(Stepping, step=step).stream(Counting(["a"], **told), ask())
    assert list(stream.pieces()) == ["a"]
    assert stream.usage == usage
    json.dumps(vars(usage)).encode()


# What hangs is seen, wherever it hangs


class Hanging:
    """Hangs wherever it is touched, until the test is over."""

    gate = threading.Event()

    def hang(self, *_: Any) -> Any:
        self.gate.wait(100)
        return iter(())

    __iter__ = close = __del__ = hang


class HangingError(Exception):
    """Whose text is never there."""

    def __str__(self) -> str:
        return str(Hanging.gate.wait(100))


class WithAnEnd(Counting):
    """Which hangs when the last reference to it goes."""

    close = None  # type: ignore[assignment]

    def __del__(self) -> None:
        Hanging.gate.wait(100)


class EndlesslyClosed(Counting):
    """Whose clean-up never ends."""

    def close(self) -> None:
        Hanging.gate.wait(100)


@pytest.fixture
def hang() -> Iterator[Callable[..., Any]]:
    Hanging.gate.clear()
    yield lambda *_: Hanging.gate.wait(100)
    Hanging.gate.set()


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*_: Any) -> Any:
        raise error

    return raises


PLACES: list[Any] = [
    pytest.param(Scripted, {"predict": lambda _: Hanging.gate.wait(100)}, None, id="predict"),
    pytest.param(Scripted, {"predict": lambda _: Hanging()}, None, id="what it gives"),
    pytest.param(Scripted, {"predict": raising(HangingError())}, None, id="the text of what it raises"),
    pytest.param(Stepping, {"start": lambda _: Hanging.gate.wait(100)}, Counting, id="start"),
    pytest.param(Stepping, {"step": lambda _: Hanging.gate.wait(100)}, Counting, id="step"),
    pytest.param(Stepping, {"step": step}, EndlesslyClosed, id="a sequence's close"),
    pytest.param(Stepping, {"step": step, "start": lambda made: WithAnEnd(made)}, list, id="a sequence's end"),
    pytest.param(Streaming, {"stream": lambda _: Hanging.gate.wait(100)}, Counting, id="stream"),
    pytest.param(Streaming, {"stream": lambda _: Hanging()}, Counting, id="its iterator"),
    pytest.param(Streaming, {"stream": lambda made: made}, EndlesslyClosed, id="a stream's close"),
]


@pytest.mark.parametrize(("agent", "script", "kind"), PLACES)
def test_a_call_that_hangs_is_seen_as_stuck(
    make_model: MakeModel, hang: Callable[..., Any], agent: type[Scripted], script: dict[str, Any], kind: type[Counting] | None
) -> None:
    model = make_model(agent, settings={"timeout_s": 0.05}, **script)
    assert model.is_alive()
    caller = threading.Thread(target=_swallow, args=(lambda: list(model.stream(kind([]), ask()).pieces()),)) if kind else None
    caller = caller or threading.Thread(target=_swallow, args=(lambda: model.predict(["a"], ask()),))
    caller.start()
    wait_until("it is given up", lambda: not model.is_alive())
    Hanging.gate.set()
    caller.join()


def _swallow(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:  # noqa: BLE001, S110  what the caller is told is not the point here
        pass


# The end


def test_the_agent_is_closed_once_after_the_last_answer(make_model: MakeModel) -> None:
    order: list[str] = []
    gate = threading.Event()

    def predict(inputs: list[Any]) -> list[Any]:
        gate.wait(100)
        order.append("answered")
        return inputs

    model = make_model(Scripted, predict=predict, close=lambda: order.append("closed"))
    caller = threading.Thread(target=lambda: model.predict(["a"], ask()))
    caller.start()
    wait_until("it is computed", lambda: model.batcher.waiting() == 0 and not model.batcher._is_idle)
    closing = threading.Thread(target=lambda: order.append(f"ended: {model.close(100)}"))
    closing.start()
    gate.set()
    caller.join()
    closing.join()
    assert order == ["answered", "closed", "ended: True"]


@pytest.mark.parametrize("error", [OSError("broken"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_a_close_that_raises_is_logged_and_the_end_goes_on(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    model = make_model(Scripted, close=raising(error))
    assert model.close(100)
    assert "the agent's close() failed" in caplog.text
    assert type(error).__name__ in caplog.text


def test_a_close_that_cannot_even_be_looked_up_is_logged_too(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    class Locked(Scripted):
        @property
        def close(self) -> Any:
            raise OSError("locked")

    GuardedAgent(Locked()).close()
    assert "OSError: locked" in caplog.text


def test_a_close_that_hangs_is_not_waited_for_longer_than_asked(make_model: MakeModel, hang: Callable[..., Any]) -> None:
    assert not make_model(Scripted, close=hang).close(0.05)


def test_sequences_are_closed_before_the_agent_is(make_model: MakeModel) -> None:
    order: list[str] = []

    class Noted(Counting):
        def close(self) -> None:
            order.append("the sequence")

    model = make_model(Stepping, step=step, close=lambda: order.append("the agent"))
    stream = model.stream(Noted(["a"] * 10**5), ask())
    assert model.close(100)
    with pytest.raises(Unavailable, match="the function is ending"):
        list(stream.pieces())
    assert order == ["the sequence", "the agent"]


def test_who_is_told_to_end_while_it_loads_stays_draining(make_model: MakeModel) -> None:
    gate, is_loading = threading.Event(), threading.Event()

    def load() -> None:
        is_loading.set()
        gate.wait(100)

    model = make_model(Scripted, wait=False, load=load)
    assert is_loading.wait(100)
    assert model.phase == "loading"
    model.drain()
    assert model.phase == "draining"
    gate.set()
    wait_until("it has loaded", lambda: "ready" in model.stages)
    assert model.phase == "draining"
    assert model.status()["phase"] == "draining"


def test_an_agent_that_still_loads_is_not_waited_for_at_the_end(make_model: MakeModel, hang: Callable[..., Any]) -> None:
    model = make_model(Scripted, wait=False, load=hang)
    assert not model.close(3600)


# Admission


def test_batch_work_is_let_in_while_its_own_queue_is_empty(make_model: MakeModel) -> None:
    gate = threading.Event()
    model = make_model(Scripted, settings={"queue_limit": 1, "max_batch": 1}, predict=lambda inputs: (gate.wait(100), inputs)[1])
    found: dict[str, Any] = {}

    def call(name: str, **more: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: model.predict([name], ask(**more))}))
        thread.start()
        return thread

    threads = [call("running")]
    wait_until("it is computed", lambda: model.batcher.waiting() == 0 and not model.batcher._is_idle)
    threads.append(call("waiting"))
    wait_until("it waits", lambda: model.batcher.waiting() == 1)
    with pytest.raises(Unavailable, match="FUNCTION_QUEUE_LIMIT"):
        model.admit(Priority.INTERACTIVE)
    model.admit(Priority.BATCH)
    threads.append(call("batch", priority=Priority.BATCH))
    wait_until("both wait", lambda: model.batcher.waiting() == 2)
    with pytest.raises(Unavailable, match="FUNCTION_QUEUE_LIMIT"):
        model.admit(Priority.BATCH)
    gate.set()
    for thread in threads:
        thread.join()
    assert found == {name: [name] for name in ("running", "waiting", "batch")}


# Parameters


def test_an_agent_that_takes_parameters_gets_its_own_copy_of_them(make_model: MakeModel) -> None:
    seen = []

    def predict(inputs: list[Any], parameters: dict[str, Any]) -> list[Any]:
        seen.append(json.dumps(parameters))
        parameters.clear() if len(inputs) == 1 else parameters["more"].clear()
        return inputs

    model = make_model(WithParameters, predict=predict, settings={"max_batch": 2})
    given = {"top_k": 1, "more": {"a": 1}}
    assert model.predict([1, 2, 3, 4, 5], ask(), given) == [1, 2, 3, 4, 5]  # three batches
    assert seen == [json.dumps(given)] * 3
    assert given == {"top_k": 1, "more": {"a": 1}}


def test_an_agent_that_takes_parameters_gets_none_as_an_empty_dict(make_model: MakeModel) -> None:
    nothing_said: tuple[dict[str, Any] | None, ...] = (None, {})
    model = make_model(WithParameters, predict=lambda inputs, parameters: [parameters])
    assert [model.predict(["a"], ask(), given) for given in nothing_said] == [[{}], [{}]]


def test_parameters_that_nobody_takes_are_refused_with_their_names(make_model: MakeModel) -> None:
    model = make_model(Scripted)
    with pytest.raises(BadInput, match="leave out 'top_k', 'seed'"):
        model.predict(["a"], ask(), {"top_k": 1, "seed": 2})
    with pytest.raises(BadInput, match="leave out 'top_k'"):
        model.submit(["a"], ask(), lambda: None, {"top_k": 1})
    answers(model)


def test_calls_with_other_parameters_are_computed_by_themselves(make_model: MakeModel) -> None:
    gate, seen = threading.Event(), []

    def predict(inputs: list[Any], parameters: dict[str, Any]) -> list[Any]:
        gate.wait(100)
        seen.append((sorted(inputs), parameters))
        return inputs

    model = make_model(WithParameters, predict=predict)
    given: list[tuple[int, dict[str, Any] | None]] = [
        (0, None),
        (1, {"k": 1}),
        (2, {"k": 1}),
        (3, {"k": 2}),
        (4, {"k": True}),
        (5, {"k": 1.0}),
        (6, None),
    ]
    calls = []
    for number, parameters in given:
        calls.append(model.submit([number], ask(), lambda: None, parameters))
        wait_until("the first is computed", lambda: model.batcher.waiting() == len(calls) - 1)
    gate.set()
    wait_until("all are done", lambda: all(call.reply.is_settled() for call in calls))
    assert seen == [([0], {}), ([1, 2], {"k": 1}), ([3], {"k": 2}), ([4], {"k": True}), ([5], {"k": 1.0}), ([6], {})]
    assert [type(parameters.get("k")) for _, parameters in seen] == [type(None), int, int, bool, float, type(None)]


# What it declares


def test_what_an_agent_does_not_declare_is_the_default() -> None:
    assert GuardedAgent(Scripted()).traits() == Traits(inputs=list(Traits().inputs), outputs=list(Traits().outputs))


@pytest.mark.parametrize(
    ("declared", "types"), [("image/PNG", ("image/png",)), (["image/*", "a/b"], ("image/*", "a/b")), ((), ())], ids=repr
)
def test_a_lone_media_type_may_stand_without_a_list(declared: Any, types: tuple[str, ...]) -> None:
    agent = Scripted()
    agent.media_types = declared  # type: ignore[attr-defined]
    assert GuardedAgent(agent).traits().media_types == types
