"""An event that is delivered more than once: the memory itself, and what senders see of it at a real server."""

import base64
import itertools
import json
import random
import socket
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from werkzeug.datastructures import Headers

from function.http import PredictRequest
from function.memory import Key, Memory, Work
from function.protocols import cloudevents
from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running, wait_until

# The memory


@dataclass(frozen=True)
class Text:
    """A reply."""

    said: str
    size_bytes: int


class Deliveries(RuleBasedStateMachine):
    """Events that come, finish, fail and are forgotten, beside a model that says what has to hold of them."""

    @initialize(entries=st.integers(1, 4), size_bytes=st.sampled_from([2500, 5000, 1 << 20]))
    def make(self, entries: int, size_bytes: int) -> None:
        self.now = 0.0
        self.entries, self.size_bytes = entries, size_bytes
        self.memory: Memory[Text] = Memory(entries=entries, size_bytes=size_bytes, keep_s=10, clock=lambda: self.now)
        self.running: dict[Key, Work[Text]] = {}
        self.finished: dict[Key, tuple[Text, float]] = {}  # the last time it was
        self.sizes: list[tuple[Key, int]] = []  # of all that were finished, those that have failed again since among them
        self.numbers = itertools.count()

    @rule(key=st.sampled_from([b"1", b"2", b"3", b"4", b"5", b"6"]))
    def come(self, key: Key) -> None:
        work, is_ours = self.memory.claim(key)
        if key in self.running:
            assert (work, is_ours) == (self.running[key], False)
            assert not work.is_over()
        elif is_ours:
            assert not self.must_be_known(key)
            self.running[key] = work
        else:
            reply, done_at = self.finished[key]
            assert work.is_over()
            assert work.reply is reply
            assert self.now < done_at + 10

    def must_be_known(self, key: Key) -> bool:
        """Whether it is young, and few enough were finished after it."""
        if key not in self.finished or self.now >= self.finished[key][1] + 10:
            return False
        last = max(at for at, (finished, _) in enumerate(self.sizes) if finished == key)
        later = [size for _, size in self.sizes[last:]]
        return len(later) <= self.entries and sum(later) <= self.size_bytes

    @precondition(lambda self: self.running)
    @rule(data=st.data(), size=st.sampled_from([0, 100, 1000, 2000, 1 << 21]))
    def finish(self, data: st.DataObject, size: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        work, reply = self.running.pop(key), Text(str(next(self.numbers)), size)
        self.memory.finish(work, reply)
        assert work.wait(0)
        assert work.reply is reply
        self.finished.pop(key, None)
        if size < 1 << 20:
            self.finished[key] = reply, self.now
            self.sizes.append((key, size + 1000))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), error=st.none() | st.just(ValueError("no")))
    def fail(self, data: st.DataObject, error: Exception | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        work = self.running.pop(key)
        self.memory.fail(work, error)
        assert work.wait(0)
        assert (work.reply, work.error) == (None, error)
        self.finished.pop(key, None)

    @rule(seconds=st.sampled_from([0.5, 3, 9, 11]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def is_within_its_bounds(self) -> None:
        if hasattr(self, "memory"):
            entries, size_bytes = self.memory.kept()
            assert entries <= self.entries
            assert size_bytes <= self.size_bytes
            assert (entries == 0) == (size_bytes == 0)


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_without_entries_every_event_is_worked_on() -> None:
    memory: Memory[Text] = Memory(entries=0, size_bytes=1000, keep_s=10)
    first, is_first = memory.claim(b"1")
    second, is_second = memory.claim(b"1")
    memory.finish(first, Text("a", 1))
    assert (is_first, is_second, first is second) == (True, True, False)
    assert memory.claim(b"1")[1]
    assert memory.kept() == (0, 0)


@pytest.mark.parametrize("text", ["short", "😀" * 1000], ids=["short attributes", "long ones of wide characters"])
def test_what_is_kept_takes_no_more_than_it_is_counted_for(text: str) -> None:
    """orjson's bytes hold on to a buffer of 4 KiB, which a bound of 32 MiB would make 200."""
    memory: Memory[cloudevents.Reply] = Memory(entries=2000, size_bytes=32 << 20, keep_s=60)
    tracemalloc.start()
    try:
        for number in range(2000):
            attributes = REQUIRED | {"id": f"event-{number} {text}", "source": f"{text} {number}", "subject": f"{text} {number}"}
            event = cloudevents.Event(attributes, PredictRequest([number, "x" * 2000], is_bare=False))
            memory.finish(memory.claim(event.key(f"caller {number}"))[0], cloudevents.reply_to("/models/m", event, [{"got": number}]))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken < 1.1 * memory.kept()[1] < 2.0 * taken


# At a server

AGENT = """
import pathlib
import time
from function.agent import BadInput

class Probe:
    def load(self, weights, device):
        self.calls, self.failed = [], {}

    def predict(self, inputs, parameters=None):
        if inputs == ["calls"]:  # what was asked since the last time
            calls, self.calls = self.calls, []
            return [calls]
        self.calls.extend(item["n"] for item in inputs)
        for item in inputs:
            if item.get("bad"):
                raise BadInput("it is bad")
            if self.failed.get(item["n"], 0) < item.get("fail", 0):
                self.failed[item["n"]] = self.failed.get(item["n"], 0) + 1
                raise RuntimeError("once more, please")
            if item.get("hold"):
                pathlib.Path(item["hold"] + ".begun").touch()
            until = time.monotonic() + 60
            while item.get("hold") and not pathlib.Path(item["hold"]).exists() and time.monotonic() < until:
                time.sleep(0.005)
        odd = {"bytes": b"\\x00\\xff", "odd": object()}
        return [next((odd[name] for name in odd if item.get(name)), {"got": item["n"]} | (parameters or {})) for item in inputs]
"""
REQUIRED = {"specversion": "1.0", "source": "/t", "type": "relight.test"}
STRUCTURED, BATCH = "application/cloudevents+json", "application/cloudevents-batch+json"
QUEUE_LIMIT = 8
ENTRIES = 60


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("memory")
    env = environment(folder)
    with running([str(BIN / "python"), "-m", "function"], folder / "log", env, int(env["PORT"])) as found:
        yield found.ready()


def environment(folder: Path) -> dict[str, str]:
    """Of a server with the agent, which is put into the folder."""
    (folder / "remembering_agent.py").write_text(AGENT)
    return clean_environment(
        PYTHONPATH=str(folder),
        PORT=str(free_port()),
        FUNCTION_HOST="127.0.0.1",
        FUNCTION_AGENT="remembering_agent:Probe",
        FUNCTION_MODEL_NAME="m",
        FUNCTION_MAX_BATCH="4",
        FUNCTION_QUEUE_LIMIT=str(QUEUE_LIMIT),
        FUNCTION_EVENT_MEMORY=str(ENTRIES),
    )


@pytest.fixture
def fresh(server: Server) -> Callable[[Any], dict[str, Any]]:
    """Makes events that nobody has seen, with an input of the given `n`."""
    calls(server)
    prefix = uuid.uuid4().hex
    return lambda n: REQUIRED | {"id": f"{prefix}-{n}", "data": {"n": n}}


def event(fresh: Callable[[Any], dict[str, Any]], n: Any = 0, **data: Any) -> dict[str, Any]:
    made = fresh(n)
    return made | {"data": made["data"] | data}


def binary(server: Server, sent: dict[str, Any], headers: dict[str, str] | None = None) -> Reply:
    attributes = {f"ce-{name}": value for name, value in sent.items() if name != "data"}
    return request(server.port, "POST", "/", sent["data"], attributes | (headers or {}))


def structured(server: Server, sent: dict[str, Any]) -> Reply:
    return request(server.port, "POST", "/", sent, {"Content-Type": STRUCTURED})


def batch(server: Server, *sent: dict[str, Any], headers: dict[str, str] | None = None) -> Reply:
    return request(server.port, "POST", "/", list(sent), {"Content-Type": BATCH} | (headers or {}))


def calls(server: Server) -> list[Any]:
    """The inputs that the agent was asked since the last time."""
    found: list[Any] = request(server.port, "POST", "/", "calls").json()
    return found


def metric(server: Server, name: str) -> float:
    lines = request(server.port, "GET", "/metrics").body.decode().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


def waiting(server: Server, count: int) -> None:
    """Until so many repeated events wait for their first one."""
    wait_until(f"{count} wait", lambda: metric(server, "function_event_duplicates_waiting") == count)


def test_an_event_that_comes_again_gets_the_first_reply_and_the_model_is_not_asked(
    server: Server, fresh: Callable[[Any], dict[str, Any]]
) -> None:
    before = metric(server, 'function_event_duplicates_total{reply="remembered"}')
    sent = event(fresh)
    first, second = binary(server, sent), binary(server, sent | {"traceparent": "00-1-2-01"})
    assert (first.status, first.body) == (second.status, second.body) == (200, b'{"got":0}')
    assert {name: value for name, value in first.headers.items() if name.startswith("ce-")} == {
        name: value for name, value in second.headers.items() if name.startswith("ce-")
    }
    assert calls(server) == [0]
    assert metric(server, 'function_event_duplicates_total{reply="remembered"}') == before + 1


@pytest.mark.parametrize("kind", ["json", "bytes"])
def test_the_reply_is_the_same_event_in_whichever_mode_it_is_asked_for(
    server: Server, fresh: Callable[[Any], dict[str, Any]], kind: str
) -> None:
    sent = event(fresh, bytes=kind == "bytes")
    replies = [batch(server, sent).json()[0], structured(server, sent).json(), batch(server, sent).json()[0]]
    assert replies[0] == replies[1] == replies[2]
    found = binary(server, sent)
    assert found.headers["ce-id"] == replies[0]["id"]
    assert found.headers["ce-time"] == replies[0]["time"]
    assert found.body == (b"\x00\xff" if kind == "bytes" else json.dumps(replies[0]["data"], separators=(",", ":")).encode())
    assert calls(server) == [0]


def test_an_event_of_another_source_id_type_or_data_is_another(server: Server, fresh: Callable[[Any], dict[str, Any]]) -> None:
    sent = event(fresh)
    others: list[dict[str, Any]] = [{"type": "another"}, {"source": "/u"}, {"id": sent["id"] + "x"}, {"source": "/t/"}]
    others += [{"data": {"n": 0, "other": None}}, {"data": {"n": 0, "other": 0}}, {"data": {"n": 0, "other": False}}]
    replies = [binary(server, sent | other) for other in [{}, *others, {}]]
    assert [reply.status for reply in replies] == [200] * 9
    assert calls(server) == [0] * 8
    assert len({reply.headers["ce-id"] for reply in replies}) == 8
    assert replies[0].headers["ce-time"] == replies[-1].headers["ce-time"]


def test_an_event_of_the_same_id_with_other_data_gets_its_own_answer_in_a_batch_too(
    server: Server, fresh: Callable[[Any], dict[str, Any]]
) -> None:
    one = event(fresh, 1)
    two = one | {"data": {"n": 2}}
    replies = batch(server, one, two, one).json()
    assert [reply["data"]["got"] for reply in replies] == [1, 2, 1]
    assert replies[0] == replies[2]
    assert replies[0]["id"] != replies[1]["id"]
    assert structured(server, two).json() == replies[1]
    assert Counter(calls(server)) == {1: 1, 2: 1}


def test_events_of_other_parameters_are_others_and_each_has_its_own(server: Server, fresh: Callable[[Any], dict[str, Any]]) -> None:
    sent = event(fresh)
    several = [sent | {"data": {"instances": [{"n": n}], "parameters": {"by": by}}} for n in (1, 2) for by in (1, True, 1.5, 1)]
    replies = batch(server, *several).json()
    assert [reply["data"]["predictions"][0] for reply in replies] == [{"got": n, "by": by} for n in (1, 2) for by in (1, True, 1.5, 1)]
    assert [type(reply["data"]["predictions"][0]["by"]) for reply in replies] == [int, bool, float, int] * 2
    assert len({reply["id"] for reply in replies}) == 6
    assert structured(server, several[1]).json() == replies[1]
    assert Counter(calls(server)) == {1: 3, 2: 3}


def test_nobody_gets_the_answer_of_another_caller(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("key-of-alice\nkey-of-bob\n")
    env = environment(tmp_path) | {"FUNCTION_API_KEYS_FILE": str(keys)}
    with running([str(BIN / "python"), "-m", "function"], tmp_path / "log", env, int(env["PORT"])) as found:
        found.ready()

        def ask(who: str, n: str) -> tuple[bytes, str, str]:
            reply = binary(found, REQUIRED | {"id": "7", "data": {"n": n}}, {"Authorization": f"Bearer key-of-{who}"})
            assert reply.status == 200
            return reply.body, reply.headers["ce-id"], reply.headers["ce-time"]

        first = {(who, n): ask(who, n) for n in ("both", "alice", "bob") for who in ("alice", "bob") if n in ("both", who)}
        assert {asked: body for asked, (body, _, _) in first.items()} == {
            asked: json.dumps({"got": asked[1]}, separators=(",", ":")).encode() for asked in first
        }
        assert first["alice", "both"][2] != first["bob", "both"][2]  # each was worked on
        assert first["alice", "both"][1] == first["bob", "both"][1]  # for receivers it is one event all the same
        assert len({reply_id for _, reply_id, _ in first.values()}) == 3
        assert {asked: ask(*asked) for asked in first} == first


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: not (isinstance(value, dict) and "instances" in value))


def digests_of(value: Any) -> list[bytes]:
    """Of an event with this data, as it comes in each mode."""
    kind, written = ("application/json", json.dumps(value).encode()) if not isinstance(value, bytes) else ("image/png", value)
    attributes = REQUIRED | {"id": "1", "datacontenttype": kind}
    data = {"data_base64": base64.b64encode(written).decode()}
    documents: list[dict[str, Any]] = [attributes | data]
    if not isinstance(value, bytes):
        reordered = dict(reversed(value.items())) if isinstance(value, dict) else value
        documents += [attributes | {"data": value}, REQUIRED | {"id": "1", "data": reordered}]
    headers = Headers({f"ce-{name}": said for name, said in REQUIRED.items()} | {"ce-id": "1", "Content-Type": kind})
    events = [cloudevents.from_http(headers, written, json.loads), *cloudevents.from_batch(documents, json.loads)]
    return [event.digest for event in events]


@given(ANY_VALUE | st.binary(max_size=5), ANY_VALUE | st.binary(max_size=5))
@example(1, "1")
@example("1", b"1")
@example(1, 1.0)
@example(1, True)
@example({"a": 1, "b": 2}, {"a": 12})
@example([], {})
@example(None, b"null")
@example({"a": {"b": 1, "c": 2}}, {"a": {"b": 2, "c": 1}})
def test_the_same_data_make_the_same_event_in_each_mode_and_other_data_another(one: Any, two: Any) -> None:
    found, others = digests_of(one), digests_of(two)
    assert len(set(found)) == len(set(others)) == 1
    is_same = type(one) is type(two) and json.dumps(one, default=repr, sort_keys=True) == json.dumps(two, default=repr, sort_keys=True)
    assert (found[0] == others[0]) == is_same


def test_inputs_and_callers_are_told_apart_wherever_one_ends() -> None:
    def keys_of(*attributes: str, inputs: list[Any], caller: str = "", is_bare: bool = False, parameters: Any = None) -> bytes:
        said = dict(zip(("source", "id", "type"), attributes, strict=True))
        return cloudevents.Event(said, PredictRequest(inputs, is_bare=is_bare, parameters=parameters)).key(caller)

    found = [
        keys_of("a", "bc", "t", inputs=["x"]),
        keys_of("ab", "c", "t", inputs=["x"]),
        keys_of("a", "b", "ct", inputs=["x"]),
        keys_of("a", "bc", "t", inputs=["x"], caller="a"),
        keys_of("a", "bc", "t", inputs=["x"], caller="\ud800"),
        keys_of("a", "bc", "t", inputs=["x"], is_bare=True),
        keys_of("a", "bc", "t", inputs=["x"], parameters={"a": 1}),
        keys_of("a", "bc", "t", inputs=["x"], parameters={"a": True}),
        keys_of("a", "bc", "t", inputs=["x", "x"]),
        keys_of("a", "bc", "t", inputs=[["x", "x"]]),
        keys_of("a", "bc", "t", inputs=[b"x", b"y"]),
        keys_of("a", "bc", "t", inputs=[b"xy"]),
    ]
    assert len(set(found)) == len(found)
    assert {len(key) for key in found} == {32}


def test_the_same_event_from_several_threads_at_once_is_run_once(
    server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    joined = metric(server, 'function_event_duplicates_total{reply="joined"}')
    sent = event(fresh, hold=str(tmp_path / "go"))
    with ThreadPoolExecutor(QUEUE_LIMIT) as threads:
        ways = (binary, structured, batch)
        replies = [threads.submit(ways[n % 3], server, sent) for n in range(QUEUE_LIMIT)]
        waiting(server, QUEUE_LIMIT - 1)
        (tmp_path / "go").touch()
        found = [reply.result() for reply in replies]
    assert [reply.status for reply in found] == [200] * QUEUE_LIMIT
    documents = [reply.json() if n % 3 == 1 else reply.json()[0] for n, reply in enumerate(found) if n % 3]
    assert len({json.dumps(document, sort_keys=True) for document in documents}) == 1
    assert {reply.headers["ce-time"] for n, reply in enumerate(found) if n % 3 == 0} == {documents[0]["time"]}
    assert calls(server) == [0]
    assert metric(server, 'function_event_duplicates_total{reply="joined"}') == joined + QUEUE_LIMIT - 1
    assert metric(server, "function_event_duplicates_waiting") == 0


def test_no_more_than_the_queues_limit_wait_for_an_event_that_is_being_worked_on(
    server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    sent = event(fresh, hold=str(tmp_path / "go"))
    with ThreadPoolExecutor(QUEUE_LIMIT + 1) as threads:
        replies = [threads.submit(binary, server, sent) for _ in range(QUEUE_LIMIT + 1)]
        waiting(server, QUEUE_LIMIT)
        refused = binary(server, sent)
        (tmp_path / "go").touch()
        assert [reply.result().status for reply in replies] == [200] * (QUEUE_LIMIT + 1)
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert "FUNCTION_QUEUE_LIMIT" in refused.json()["error"]["message"]
    assert calls(server) == [0]


def test_who_joins_waits_no_longer_than_its_own_deadline(server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path) -> None:
    sent = event(fresh, hold=str(tmp_path / "go"))
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(binary, server, sent)
        wait_until("it is being worked on", (tmp_path / "go.begun").exists)
        impatient = binary(server, sent, {"X-Request-Timeout-Ms": "100"})
        (tmp_path / "go").touch()
        assert (impatient.status, first.result().status) == (504, 200)


def test_who_joins_does_the_work_if_the_first_gives_up(server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        for deadline_ms in ("1000", "5000", "25000"):  # until this machine has begun by then
            sent = event(fresh, deadline_ms, hold=str(tmp_path / "go"))
            first = threads.submit(binary, server, sent, {"X-Request-Timeout-Ms": deadline_ms})
            wait_until("it is being worked on", lambda: (tmp_path / "go.begun").exists() or first.done())  # noqa: B023  at once
            if (tmp_path / "go.begun").exists():
                break
        second = threads.submit(binary, server, sent)
        assert first.result().status == 504
        (tmp_path / "go").touch()
        assert second.result().status == 200
    assert binary(server, sent).body == second.result().body


def test_who_joins_does_the_work_if_the_first_hangs_up(server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path) -> None:
    blocked, sent = event(fresh, "held", hold=str(tmp_path / "go")), event(fresh, "wanted")
    body = json.dumps(sent).encode()
    head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: {STRUCTURED}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with ThreadPoolExecutor(2) as threads:
        threads.submit(binary, server, blocked)
        wait_until("the model is busy", (tmp_path / "go.begun").exists)
        with socket.create_connection(("127.0.0.1", server.port)) as first:
            first.sendall(head + body)
            wait_until("it waits for the model", lambda: metric(server, 'function_waiting{model="m"}') == 1)
            second = threads.submit(structured, server, sent)
            waiting(server, 1)
        (tmp_path / "go").touch()
        assert second.result().json()["data"] == {"got": "wanted"}
    assert Counter(calls(server)) == {"held": 1, "wanted": 1}


def test_a_failure_is_not_remembered_and_is_told_to_those_who_joined(
    server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    sent = event(fresh, fail=1)
    assert [binary(server, sent).status for _ in range(3)] == [500, 200, 200]
    assert calls(server) == [0, 0]
    blocked = event(fresh, "held", hold=str(tmp_path / "go"))
    bad = event(fresh, "bad", bad=True)
    with ThreadPoolExecutor(4) as threads:
        threads.submit(binary, server, blocked)
        wait_until("the model is busy", (tmp_path / "go.begun").exists)
        replies = [threads.submit(binary, server, bad) for _ in range(3)]
        waiting(server, 2)
        (tmp_path / "go").touch()
        assert [reply.result().status for reply in replies] == [400] * 3
    assert Counter(calls(server)) == {"held": 1, "bad": 1}
    assert binary(server, bad).status == 400
    assert calls(server) == ["bad"]


def test_an_answer_that_json_cannot_say_is_a_500_and_not_remembered(server: Server, fresh: Callable[[Any], dict[str, Any]]) -> None:
    sent = event(fresh, odd=True)
    assert [binary(server, sent).status, structured(server, sent).status] == [500, 500]
    assert "1 of the 2 events failed" in batch(server, event(fresh, 1), sent).json()["error"]["message"]
    assert Counter(calls(server)) == {0: 4, 1: 2}  # two alone; the batch, and then each of its two


def test_a_batch_that_is_sent_again_runs_what_was_not_done_and_answers_in_order(
    server: Server, fresh: Callable[[Any], dict[str, Any]]
) -> None:
    sent = [event(fresh, n, fail=3 if n in (2, 5) else 0) for n in range(9)]
    refused = batch(server, *sent)  # each of the two fails with its group of four, with its half, and alone
    assert (refused.status, "2 of the 9 events failed" in refused.json()["error"]["message"]) == (503, True)
    first = Counter(calls(server))
    reply = batch(server, *sent)
    assert [item["data"] for item in reply.json()] == [{"got": n} for n in range(9)]
    assert Counter(calls(server)) == {2: 1, 5: 1}
    assert set(first) == set(range(9))
    assert batch(server, *reversed(sent)).json() == reply.json()[::-1]
    assert calls(server) == []


def test_what_a_batch_finished_before_its_deadline_is_remembered(
    server: Server, fresh: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    for deadline_s in (1, 5, 25):  # until this machine has the first batch done by then
        calls(server)
        gate, numbers = tmp_path / f"go{deadline_s}", [10 * deadline_s + n for n in range(5)]
        sent = [event(fresh, n) for n in numbers[:4]] + [event(fresh, numbers[4], hold=str(gate))]  # four are a batch of the model
        late = batch(server, *sent, headers={"X-Request-Timeout-Ms": f"{deadline_s}000"})
        if "5 of the 5" not in late.json()["error"]["message"]:
            break
        gate.touch()
    assert (late.status, "1 of the 5 events failed" in late.json()["error"]["message"]) == (503, True)
    gate.touch()
    assert batch(server, *sent).status == 200
    assert Counter(calls(server)) == dict.fromkeys(numbers[:4], 1) | {numbers[4]: 2}


def test_an_event_that_stands_twice_in_a_batch_is_run_once(server: Server, fresh: Callable[[Any], dict[str, Any]]) -> None:
    one, two = event(fresh, 1), event(fresh, 2)
    replies = batch(server, one, two, one, one).json()
    assert [reply["data"]["got"] for reply in replies] == [1, 2, 1, 1]
    assert replies[0] == replies[2] == replies[3]
    assert Counter(calls(server)) == {1: 1, 2: 1}
    assert "3 of the 3 events failed" in batch(server, *[event(fresh, 3, fail=9)] * 3).json()["error"]["message"]


def test_batches_with_events_in_common_do_not_wait_for_each_other(server: Server, fresh: Callable[[Any], dict[str, Any]]) -> None:
    sent = [event(fresh, n) for n in range(12)]

    def deliver(seed: int) -> dict[str, Any]:
        shuffled = random.Random(seed).sample(sent, len(sent))
        reply = batch(server, *shuffled)
        assert reply.status == 200, reply.body
        return {one["id"]: answer for one, answer in zip(shuffled, reply.json(), strict=True)}

    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(deliver, range(6)))
    assert all(one == found[0] for one in found)
    assert Counter(calls(server)) == dict.fromkeys(range(12), 1)


def test_the_oldest_events_are_forgotten_when_there_are_too_many(server: Server, fresh: Callable[[Any], dict[str, Any]]) -> None:
    first = event(fresh, "first")
    assert binary(server, first).status == 200
    for n in range(0, ENTRIES, 20):
        assert batch(server, *[event(fresh, n + m) for m in range(20)]).status == 200
    assert metric(server, "function_event_memory_entries") == ENTRIES
    assert ENTRIES * 100 < metric(server, "function_event_memory_bytes") < ENTRIES * 2000
    assert binary(server, first).status == 200
    assert Counter(calls(server))["first"] == 2


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deliveries=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=8),
    failures=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
def test_however_events_are_delivered_each_succeeds_once_and_has_one_reply(
    server: Server, deliveries: list[list[int]], failures: list[int]
) -> None:
    calls(server)
    prefix, replies = uuid.uuid4().hex, dict[int, Any]()
    for numbers in deliveries:
        sent = [REQUIRED | {"id": f"{prefix}{n}", "data": {"n": f"{prefix}{n}", "fail": failures[n]}} for n in numbers]
        reply = structured(server, sent[0]) if len(sent) == 1 else batch(server, *sent)
        if reply.status != 200:
            assert reply.status == (500 if len(sent) == 1 else 503)
            continue
        documents = [reply.json()] if len(sent) == 1 else reply.json()
        for n, document in zip(numbers, documents, strict=True):
            assert document["data"] == {"got": f"{prefix}{n}"}
            assert replies.setdefault(n, document) == document
    before = calls(server)
    for n, document in replies.items():
        again = structured(server, REQUIRED | {"id": f"{prefix}{n}", "data": {"fail": failures[n], "n": f"{prefix}{n}"}})
        assert again.json() == document
    assert calls(server) == []
    assert set(before) <= {f"{prefix}{n}" for numbers in deliveries for n in numbers}
