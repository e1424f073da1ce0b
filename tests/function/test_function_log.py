"""The log: that writing it holds nobody up, whoever reads it or does not, and that nobody but us makes its lines."""

import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from function.log import MOST_QUEUED_BYTES, MOST_RECORD, LineFormatter, LogHandler, LogWriter
from tests.support import BIN, ROOT, clean_environment, free_port, request, running, wait_until

LINE = b"x" * 99 + b"\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its ends, to read and to write; tests may close either."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError:
            pass


def read_until(fd: int, end: bytes) -> bytes:
    """All that comes, until it ends so."""
    found = b""
    while not found.endswith(end):
        piece = os.read(fd, 1 << 16)
        assert piece, found[-200:]
        found += piece
    return found


# Writing


def test_a_line_is_out_at_once_if_there_is_room_and_so_in_order_with_what_others_print(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    for number in range(20):
        writer.write(b"ours %d\n" % number)
        os.write(pipe[1], b"theirs %d\n" % number)
    assert os.read(pipe[0], 1 << 16) == b"".join(b"ours %d\ntheirs %d\n" % (number, number) for number in range(20))
    assert not any(thread.name == "log" for thread in threading.enumerate())


def test_nobody_waits_for_a_reader_who_does_not_read_and_what_is_lost_is_counted(pipe: tuple[int, int]) -> None:
    writer, count = LogWriter(pipe[1]), 4 * MOST_QUEUED_BYTES // len(LINE)
    for number in range(count):
        writer.write(b"%099d\n" % number)
    writer.flush(0.01)
    read = read_until(pipe[0], b"as nobody read them\n")
    *kept, last = read.splitlines()
    assert [int(line) for line in kept] == list(range(len(kept)))
    assert len(kept) * len(LINE) >= MOST_QUEUED_BYTES
    found = re.fullmatch(rb"[\d-]+ [\d:,]+ WARNING relight.function: (\d+) lines of the log were lost, as nobody read them", last)
    assert found
    assert len(kept) + int(found[1]) == count
    writer.flush(60)
    writer.write(b"again\n")
    assert read_until(pipe[0], b"\n") == b"again\n"


def test_a_line_that_is_larger_than_all_that_may_wait_is_lost_and_counted(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    writer.write(b"x" * MOST_QUEUED_BYTES + b"y\n")
    assert b" 1 lines of the log were lost" in read_until(pipe[0], b"as nobody read them\n")


def test_a_long_line_of_which_the_pipe_takes_a_part_comes_whole(pipe: tuple[int, int]) -> None:
    writer, long = LogWriter(pipe[1]), b"y" * 200_000 + b"\n"
    writer.write(long)
    writer.write(b"short\n")
    assert read_until(pipe[0], b"short\n") == long + b"short\n"


@pytest.mark.parametrize("tellable", [True, False], ids=["the kernel knows RWF_NOWAIT", "it does not"])
def test_lines_of_many_threads_come_whole_and_each_threads_in_its_order(pipe: tuple[int, int], tellable: bool) -> None:
    writer = LogWriter(pipe[1])
    writer._can_refuse = tellable

    def write(thread: int) -> None:
        for number in range(500):
            writer.write(b"%d %d %s\n" % (thread, number, b"z" * (number % 300)))

    with ThreadPoolExecutor(9) as pool:
        read = pool.submit(lambda: read_until(pipe[0], b"the end\n"))
        for done in [pool.submit(write, thread) for thread in range(8)]:
            done.result()
        writer.write(b"the end\n")
        lines = read.result().splitlines()[:-1]
    found = [[int(line.split()[1]) for line in lines if line.startswith(b"%d " % thread)] for thread in range(8)]
    assert found == [list(range(500))] * 8
    assert {len(line.split(b" ")[2]) for line in lines} == set(range(300))


@pytest.mark.parametrize("tellable", [True, False], ids=["the kernel knows RWF_NOWAIT", "it does not"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal"])
def test_nobody_waits_whatever_kind_of_file_it_is(kind: str, tellable: bool) -> None:
    if kind == "socket":
        ours, theirs = (end.detach() for end in socket.socketpair())
    else:
        theirs, ours = os.pipe() if kind == "pipe" else os.openpty()
    writer = LogWriter(ours)
    writer._can_refuse = tellable
    for _ in range(10_000):
        writer.write(LINE)
    found = read_until(theirs, LINE.replace(b"\n", b"\r\n") if kind == "terminal" else LINE)
    assert set(found.split()) == {LINE.strip()}


def test_a_file_has_all_lines_at_once(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        writer = LogWriter(file.fileno())
        for _ in range(1000):
            writer.write(LINE)
        assert (tmp_path / "log").read_bytes() == LINE * 1000


def test_a_reader_who_has_gone_and_a_descriptor_that_is_closed_are_no_error(pipe: tuple[int, int]) -> None:
    blocked = LogWriter(pipe[1])
    for _ in range(2000):
        blocked.write(LINE)
    os.close(pipe[0])
    blocked.flush(60)
    blocked.write(LINE)
    os.close(pipe[1])
    blocked.write(LINE)
    LogWriter(pipe[1]).write(LINE)


def test_a_signal_handler_may_log_whatever_it_interrupts(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    before = signal.signal(signal.SIGALRM, lambda *_: writer.write(b"handler\n"))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(lambda: read_until(pipe[0], b"the end\n"))
            for number in range(20_000):
                writer.write(b"%d\n" % number)
            signal.setitimer(signal.ITIMER_REAL, 0)
            writer.write(b"the end\n")
            lines = read.result().splitlines()[:-1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [int(line) for line in lines if line != b"handler"] == list(range(20_000))
    assert b"handler" in lines


FORKING = """
import os, sys
from function.log import STDERR, write
while not STDERR._queue:  # until its thread waits for the reader, who has not begun
    write(b"parent\\n")
if os.fork() == 0:
    print("forked", flush=True)
    for _ in range(100_000):
        write(b"child\\n")
    STDERR.flush(60)
    os._exit(0)
os.wait()
STDERR.flush(60)
"""


def test_a_child_that_is_forked_while_lines_wait_writes_its_own_and_the_parent_the_rest() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout
        assert process.stdout.readline() == b"forked\n"
        _, said = process.communicate()
    assert process.returncode == 0
    assert set(said.split(b"\n")) == {b"parent", b"child", b""}
    assert said.count(b"child\n") == 100_000


# Records


def formatted(message: str, error: BaseException | None = None) -> str:
    about = {"msg": message, "name": "a", "levelname": "INFO", "exc_info": (type(error), error, None) if error else None}
    return LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s").format(logging.makeLogRecord(about))


ANY = st.text(st.characters() | st.sampled_from("\n\r\x1b\x85\u2028\u202e\x9b\v\f\t "), max_size=200)


@given(ANY, ANY)
@example("cannot use x\n2026-01-01 00:00:00 INFO relight.function: everything is fine", "\r2026")
@example("\ud800", "\x1b]0;title\x07")
def test_no_line_but_the_first_of_a_record_begins_at_the_margin_and_none_moves_the_cursor(message: str, reason: str) -> None:
    check_lines(formatted(message, ValueError(reason)))


def check_lines(text: str) -> None:
    first, *others = text.split("\n")
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO a: ", first)
    assert all(line.startswith("    ") for line in others)
    for line in (first, *others):
        assert line.splitlines() in ([line], [])
        assert not re.search("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", line)


@given(ANY)
@example("x\n2026-01-01 00:00:00,000 INFO a: everything is fine")
def test_nor_does_anything_else_of_an_exception(text: str) -> None:
    """Its notes, what it came from, its group, the name of its class, a line of code that cannot be parsed."""
    noted, caused = ValueError("x"), ValueError("x")
    noted.add_note(text)
    caused.__cause__ = KeyError(text)
    named = type(text.replace("\0", "").encode("utf-8", "replace").decode() or "E", (Exception,), {})("x")
    unparsed = SyntaxError(text, (text, 1, 1, text))
    for error in (noted, caused, named, ExceptionGroup(text, [ValueError(text)]), unparsed):
        check_lines(formatted("message", error))


def test_what_is_escaped_can_be_seen_and_other_text_is_left_as_it_is() -> None:
    assert formatted("\x1b[31mred\x85\u2028\r\x00").endswith(r"INFO a: \x1b[31mred\x85\u2028\r\x00")
    assert formatted("größer\tals €, 😀 \\x1b").endswith("INFO a: größer\tals €, 😀 \\x1b")


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\n" * 1_000_000, "\x1b" * 1_000_000, "ab\n" * 300_000, "://" + "a:" * 500_000])
def test_a_record_has_a_bounded_length_and_keeps_its_beginning_and_its_end(text: str) -> None:
    found = formatted(f"begin {text} end")
    assert len(found) <= MOST_RECORD + 100
    assert found.endswith(" end")
    assert "INFO a: begin" in found
    assert re.search(r"    … \d+ characters left out …    ", found)


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer s3cret-key",
        "{'Authorization': 'Bearer s3cret-key'}",
        "headers={b'authorization': b'Basic czNjcmV0LWtleQ=='}",
        "refused: bearer s3cret-key.",
        "Bearer eyJhbGciOi.eyJzM2NyZXQ.s3cret-key",
        "https://user:s3cret-key@a.example/x failed",
    ],
)
def test_credentials_do_not_reach_the_log(text: str) -> None:
    found = formatted(text, ValueError(text))
    assert not re.search("s3cret-key|czNjcmV0|eyJ", found)
    assert found.count("***") == 2


@pytest.mark.parametrize("text", ["send Authorization: Bearer <key>", "a basic tokenizer", "the bearer token.", "https://a.example/@x:y"])
def test_what_only_resembles_them_is_left(text: str) -> None:
    assert formatted(text).endswith(text)


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("not me")


def test_a_message_that_cannot_be_made_is_told_of_by_its_place(pipe: tuple[int, int]) -> None:
    handler = LogHandler(LogWriter(pipe[1]))
    for arguments in ((Unprintable(),), (1, 2)):
        handler.handle(logging.LogRecord("a", logging.INFO, "agent.py", 7, "%s", arguments, None))
    handler.handle(logging.LogRecord("a", logging.INFO, "agent.py", 7, "lone \ud800", (), None))
    first, second, third = os.read(pipe[0], 1 << 16).decode().splitlines()
    assert first.endswith(" WARNING a: a message cannot be written, RuntimeError: agent.py, line 7")
    assert second.endswith(" WARNING a: a message cannot be written, TypeError: agent.py, line 7")
    assert third.endswith(r" INFO a: lone \ud800")


ALL_WAYS = """
import logging, threading, warnings
from function.log import install
install()
from gunicorn.config import Config
from gunicorn.glogging import Logger
config = Config()
config.set("errorlog", None)
Logger(config).error("by gunicorn%s", FORGED)
logging.getLogger("any").warning("by logging%s", FORGED)
warnings.warn("by a warning" + FORGED)
def fail():
    raise ValueError("by a thread" + FORGED)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Unending:
    def __del__(self):
        raise ValueError("by the collector" + FORGED)
Unending()
"""


def test_whatever_way_a_line_comes_it_is_written_once_and_cannot_be_forged() -> None:
    forged = "\n2026-01-01 00:00:00,000 INFO forged: \x1b"
    code = f"FORGED = {forged!r}\n{ALL_WAYS}"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stderr
    for way in ("by gunicorn", "by logging", "by a warning", "by a thread", "by the collector"):
        assert said.count(way) == 1, said
    assert len(re.findall("^20", said, re.MULTILINE)) == 5
    assert said.count("    2026-01-01 00:00:00,000 INFO forged: \\x1b") == 5
    assert all(line.startswith(("20", "    ")) for line in said.splitlines())


def test_a_closed_stderr_does_not_become_somebody_elses_file(tmp_path: Path) -> None:
    code = (
        "import logging, os\n"
        "from function.log import install\n"
        "os.close(2)\n"
        "install()\n"
        "file = os.open('file', os.O_CREAT | os.O_WRONLY)\n"
        "logging.error('a line')\n"
        "assert file != 2\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / "file").read_bytes() == b""


# At a server

AGENT = """
import logging

class Agent:
    def load(self, weights, device): pass
    def predict(self, inputs):
        logging.getLogger("agent").info("%s", "y" * 1000)
        if inputs[0].startswith("x"):
            raise RuntimeError("cannot use %s" % inputs[0])
        return inputs
"""


def environment(folder: Path, port: int, **others: str) -> dict[str, str]:
    (folder / "logging_agent.py").write_text(AGENT)
    return clean_environment(
        PYTHONPATH=str(folder),
        PORT=str(port),
        FUNCTION_HOST="127.0.0.1",
        FUNCTION_AGENT="logging_agent:Agent",
        FUNCTION_MODEL_NAME="m",
        **others,
    )


@contextmanager
def unread(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server whose log goes into a pipe."""
    command, env = [str(BIN / "python"), "-m", "function"], environment(folder, port)
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            wait_until("ready", lambda: request(port, "GET", "/readyz").status == 200)
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_log_that_nobody_reads_holds_up_no_answer_and_is_there_for_who_reads_it_then(tmp_path: Path) -> None:
    port = free_port()
    with unread(tmp_path, port) as process:
        assert process.stderr

        def ask(number: int) -> int:
            body: Any = "x" if number % 5 == 0 else "a"
            return request(port, "POST", "/nowhere" if number % 7 == 0 else "/", body, {"X-Request-Id": f"n{number}"}).status

        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(ask, range(300)))
        assert set(statuses) == {200, 404, 500}
        assert request(port, "GET", "/healthz").status == 200
        found = b""
        while len(re.findall(rb'"request_id":"n\d+"', found)) < 300 and select.select([process.stderr], [], [], 60)[0]:
            found += os.read(process.stderr.fileno(), 1 << 16)
        ids = [json.loads(line)["request_id"] for line in found.splitlines() if line.startswith(b"{")]
        assert sorted(ids) == sorted(f"n{number}" for number in range(300))


def test_a_caller_cannot_write_lines_of_the_log(tmp_path: Path) -> None:
    port, forged = free_port(), "2026-01-01 00:00:00 INFO relight.function: everything is fine"
    with running([str(BIN / "python"), "-m", "function"], tmp_path / "log", environment(tmp_path, port), port) as server:
        server.ready()
        assert request(port, "POST", "/", {"instances": [f"x\n{forged}\x1b[2J"]}).status == 500
        said = wait_until("the line", lambda: '"status":500' in (found := server.said()) and found)
    assert f"\n    {forged}\\x1b[2J\n" in said
    assert all(line.startswith(("20", "    ", "{")) for line in said.splitlines())
    assert not re.search(f"^{forged}", said, re.MULTILINE)


def test_a_function_that_is_started_without_stderr_answers(tmp_path: Path) -> None:
    port = free_port()
    command = ["sh", "-c", f"exec {BIN / 'python'} -m function 2>&-"]
    with running(command, tmp_path / "log", environment(tmp_path, port), port) as server:
        server.ready()
        assert request(port, "POST", "/", "a").json() == "a"
        assert request(port, "POST", "/", "x").status == 500


def test_a_library_that_repeats_what_it_is_given_tells_no_secret(tmp_path: Path) -> None:
    """Also to a caller, of a start that has failed."""
    (tmp_path / "leaky.py").write_text(
        "import logging, os\n"
        "class Leaky:\n"
        "    def load(self, weights, device):\n"
        "        logging.getLogger('lib').warning('headers are %s', os.environ['LIB_HEADERS'])\n"
        "        raise RuntimeError('401 for ' + os.environ['HF_TOKEN'])\n"
        "    def predict(self, inputs): return inputs\n"
    )
    port = free_port()
    env = environment(tmp_path, port) | {"FUNCTION_AGENT": "leaky:Leaky", "PYTHONPATH": str(tmp_path), "FUNCTION_TELL_FAILURE_S": "60"}
    env |= {"LIB_HEADERS": "x-api-key: geheim123", "HF_TOKEN": "hf_geheim"}
    with running([str(BIN / "python"), "-m", "function"], tmp_path / "log", env, port) as server:
        found = wait_until("its failure", lambda: (reply := request(port, "GET", "/readyz")).status == 200 and reply.json())
        told = request(port, "POST", "/", 1).body.decode()
        said = server.said()
    assert found["error"].endswith("RuntimeError; the function's log says why")
    assert "headers are ***" in said
    assert "RuntimeError: 401 for ***" in said
    assert "geheim" not in told + said
