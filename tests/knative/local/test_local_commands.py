"""`relight status`, `invoke` and `logs`, as a person or a script calls them."""

import contextlib
import http.client
import io
import json
import os
import pty
import subprocess
import sys
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from knative.local import commands, messages, tables
from knative.local.address import DEFAULT_ADMIN
from knative.local.errors import PlatformError
from tests.knative.local.running import Platform, platform_running, service
from tests.support import BIN, clean_environment, free_port, wait_until


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    echo = service("echo", scale={"min-scale": "1"})
    echo["metadata"]["annotations"] = {"relight/example": '{"instances": ["an example"]}'}
    with platform_running(tmp_path_factory.mktemp("commands"), [echo, service("idle")]) as running:
        running.wait_for("echo", "ready", lambda found: found["state"] == "ready")
        yield running


def relight(*words: str, stdin: str = "", state: Path | None = None) -> subprocess.CompletedProcess[str]:
    where = ["--state-dir", str(state)] if state else []
    return subprocess.run(
        [BIN / "relight", *words, *where], input=stdin, capture_output=True, text=True, timeout=60, env=clean_environment(), check=False
    )


def document(platform: Platform, *words: str, stdin: str = "") -> Any:
    found = relight("invoke", "echo", *words, stdin=stdin, state=platform.state)
    assert (found.returncode, found.stderr) == (0, "")
    return json.loads(found.stdout)


@pytest.mark.parametrize("command", [["status"], ["status", "--watch"], ["invoke", "echo"], ["logs", "echo"]])
def test_without_a_platform_each_says_what_to_do(tmp_path: Path, command: list[str]) -> None:
    admin = f"http://127.0.0.1:{free_port()}"
    found = relight(*command, "--admin", admin)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == (
        f"Error: no platform answers at {admin} (Connection refused); start one with `relight run`, or name its admin port with --admin\n"
    )


@pytest.mark.parametrize("command", [["status"], ["invoke", "echo"], ["logs", "echo"], ["send", "work"], ["receive", "work"]])
def test_a_state_directory_that_is_named_and_has_no_platform_leads_to_no_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(commands, "Client", asked.append)
    program = next(
        found for found in (commands.status, commands.invoke, commands.logs, messages.send, messages.receive) if found.name == command[0]
    )
    found = CliRunner().invoke(program, [*command[1:], "--state-dir", str(tmp_path)])
    assert (found.exit_code, asked) == (1, [])
    assert found.output.startswith(f"Error: no platform runs with --state-dir {tmp_path}; start one with `relight run`")


@pytest.mark.parametrize("words", [[], ["--admin", "http://127.0.0.1:1", "--state-dir", "/nowhere"]], ids=["none named", "the port named"])
def test_without_a_state_directory_that_is_named_the_usual_port_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    asked: list[str] = []

    def fail(admin: str) -> None:
        asked.append(admin)
        raise PlatformError("enough")

    monkeypatch.setattr(commands, "Client", fail)
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(commands.status, words).output == "Error: enough\n"
    assert asked == [words[1] if words else DEFAULT_ADMIN]


def a_log(container: str, size: int, pod: str = "hello-00001-ab12cd") -> dict[str, Any]:
    return {"namespace": "default", "pod": pod, "container": container, "bytes": size, "changed_at": 1.0}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "function of hello-00001-ab12cd has written nothing yet; there are lines of --container weights-cache\n"),
        (["--container", "weights-cache"], ""),
        (["--container", "idle"], "idle of hello-00001-ab12cd has written nothing yet; there are lines of --container weights-cache\n"),
    ],
)
def test_a_log_with_nothing_in_it_says_where_there_is_something(monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    class Answers:
        def __init__(self, _: str) -> None: ...

        def get(self, route: str) -> Any:
            logs = [a_log("function", 0), a_log("weights-cache", 10), a_log("idle", 0), a_log("function", 99, "hello-00001-ffffff")]
            return {"/api/status": {"services": []}, "/api/logs": {"logs": logs}}[route]

        @contextlib.contextmanager
        def ask(self, *_: object) -> Iterator[Pieces]:
            yield Pieces()

    monkeypatch.setattr(commands, "Client", Answers)
    found = CliRunner().invoke(commands.logs, ["hello", *words])
    assert (found.exit_code, found.stdout, found.stderr) == (0, "", said)


@pytest.mark.parametrize("admin", ["127.0.0.1:8081", "https://127.0.0.1:8081", "http://127.0.0.1:port", "http://"])
def test_an_address_that_is_none_is_said_to_be_none(admin: str) -> None:
    found = relight("status", "--admin", admin)
    assert (found.returncode, found.stderr) == (1, f"Error: --admin {admin!r}: must be http://HOST:PORT\n")


def test_another_server_at_the_admin_address_is_not_taken_for_a_platform(platform: Platform) -> None:
    other = f"http://127.0.0.1:{platform.port}"
    found = relight("status", "--admin", other)
    assert (found.returncode, found.stderr) == (1, f"Error: what answers at {other} is no platform's admin port; name that with --admin\n")


def test_status_is_lines_with_columns_where_there_is_no_terminal(platform: Platform) -> None:
    lines = relight("status", state=platform.state).stdout.splitlines()
    assert lines[0].split()[:4] == ["SERVICE", "STATE", "PODS", "BUSY"]
    assert [line.split()[:3] for line in lines[1:3]] == [["echo", "ready", "1/1"], ["idle", "zero", "0/0"]]
    assert lines[5].split()[:2] == [platform.pods("echo")[0]["name"], "ready"]


def test_status_as_json_is_the_document_of_the_admin_port(platform: Platform) -> None:
    found = json.loads(relight("status", "--json", "--admin", f"http://127.0.0.1:{platform.admin_port}").stdout)
    assert found.keys() == platform.status().keys()


def test_status_goes_on_when_it_is_watched(platform: Platform) -> None:
    command = [str(BIN / "relight"), "status", "--watch", "--json", "--state-dir", str(platform.state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment()) as watching:
        try:
            assert watching.stdout
            first, second = (json.loads(watching.stdout.readline()) for _ in range(2))
            assert first["now"] < second["now"]
        finally:
            watching.terminate()


def test_invoke_sends_the_services_example_or_what_it_is_given(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text("[1, 2]")
    assert document(platform)["bytes"] == len('{"instances": ["an example"]}')
    assert document(platform, "--data", '{"a": 1}')["bytes"] == 8
    assert document(platform, "--data", f"@{tmp_path / 'body.json'}")["bytes"] == 6
    told = document(platform, "--data", "-", "--path", "/v1/x?y=1", "--content-type", "text/plain", stdin="hello")
    assert (told["method"], told["path"], told["bytes"]) == ("POST", "/v1/x?y=1", 5)
    assert dict(told["headers"])["Content-Type"] == "text/plain"
    assert document(platform, "--path", "/v1/models")["method"] == "GET"


def test_invoke_sends_headers_of_ones_own(platform: Platform) -> None:
    words = [
        "--header",
        "Authorization: Bearer a:b",
        "-H",
        "X-Text:  Grüße ",
        "-H",
        "X-Twice: 1",
        "-H",
        "X-Twice: 2",
        "-H",
        "Accept: text/csv",
    ]
    found = [(name, value) for name, value in document(platform, *words)["headers"] if name not in ("Host", "Content-Type")]
    assert ("Authorization", "Bearer a:b") in found
    assert [value.encode("latin-1").decode() for name, value in found if name == "X-Text"] == ["Grüße"]
    assert [value for name, value in found if name == "X-Twice"] == ["1", "2"]
    assert [value for name, value in found if name == "Accept"] == ["text/csv"]
    told = document(platform, "--data", "a,b", "-H", "content-type: text/csv")
    assert [value for name, value in told["headers"] if name.lower() == "content-type"] == ["text/csv"]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("Transfer-Encoding: chunked", "Transfer-Encoding is about one connection"),
        ("connection: close", "connection is about one connection"),
        ("Host: other", "the Service is named by its NAME"),
        ("Content-Length: 3", "it follows from the body"),
        ("X-Key", "'X-Key' is no header; write it as 'Name: value'"),
        ("X Key: 1", "'X Key' is no name of a header"),
        ("X-Key: a\r\nX-Other: b", "the value of X-Key has control characters"),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused(header: str, said: str) -> None:
    found = CliRunner().invoke(commands.invoke, ["echo", "--admin", "http://127.0.0.1:1", "--header", header])
    assert found.exit_code == 1
    assert said in found.output


def test_invoke_fails_with_the_answers_body_when_that_is_an_error(platform: Platform) -> None:
    found = relight("invoke", "echo", "--path", "/status/500", state=platform.state)
    assert (found.returncode, found.stderr) == (1, "Error: echo answered 500 Internal Server Error\n")
    found = relight("invoke", "default/nobody", state=platform.state)
    assert found.returncode == 1
    assert "no Service 'nobody' in namespace 'default'; there are echo, idle" in json.loads(found.stdout)["error"]["message"]
    found = relight("invoke", "echo", "--data", "@/nowhere", state=platform.state)
    assert (found.returncode, found.stderr) == (1, "Error: --data @/nowhere: No such file or directory\n")


def test_invoke_prints_each_piece_of_a_stream_when_it_is_there(platform: Platform) -> None:
    command = [str(BIN / "relight"), "invoke", "echo", "--stream", "--path", "/events/go-on", "--state-dir", str(platform.state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as streaming:
        assert streaming.stdout
        assert streaming.stdout.readline() == b'{"piece": 1}\n'
        platform.note("echo", "go-on")  # the rest exists only from now on
        assert streaming.stdout.read() == b'{"piece": 2}\n'
        assert streaming.wait(60) == 0


def test_an_answer_that_is_cut_off_is_a_failure(platform: Platform) -> None:
    platform.note("idle", "half-read")
    found = relight("invoke", "idle", "--path", "/half", state=platform.state)
    assert (found.returncode, "only this" in found.stdout) == (1, True)
    assert "cut off" in found.stderr


def test_logs_are_those_of_a_pod_or_of_a_services_latest(platform: Platform) -> None:
    (pod,) = platform.pods("echo")
    for name in ("echo", "default/echo", pod["name"]):
        assert relight("logs", name, state=platform.state).stdout == "a pod of its own\n"
    assert relight("logs", "echo", "--tail", "0", state=platform.state).stdout == ""
    found = relight("logs", "ech", state=platform.state)
    assert (found.returncode, "no pod, Service or queue source 'ech' has a log; pods that have one: " in found.stderr) == (1, True)
    found = relight("logs", "echo", "--container", "sidecar", state=platform.state)
    assert "has no container 'sidecar'; it has function" in found.stderr


def test_a_log_is_followed(platform: Platform) -> None:
    command = [str(BIN / "relight"), "logs", "echo", "--follow", "--tail", "0", "--state-dir", str(platform.state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=clean_environment()) as following:
        try:
            assert following.stdout

            def said() -> bool:
                platform.call("echo", "/say", "POST", b"good morning")
                return _readable(following.stdout)

            wait_until("a line", said)  # until it is there, what is said is older than its beginning
            assert following.stdout.readline() == b"good morning\n"
        finally:
            following.terminate()


def _readable(stream: Any, seconds: float = 0.1) -> bool:
    import select

    return bool(select.select([stream], [], [], seconds)[0])


class Pieces:
    """An answer that comes in these pieces; the last may be an error."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = list(pieces)

    def read1(self, _: int) -> bytes:
        piece = self._pieces.pop(0) if self._pieces else b""
        if isinstance(piece, Exception):
            raise piece
        return piece


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, show: Callable[[Any], object], *pieces: bytes | Exception) -> bytes:
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        show(Pieces(*pieces))
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    return shown


HARMFUL = b"\x1b]0;title\x07\x1b[2J\x9b\xc2\x9b\xe2\x80\xae\rforged"
HARMLESS = rb"\x1b]0;title\x07\x1b[2J\x9b\x9b\u202e\rforged"


def test_an_answer_on_a_terminal_keeps_its_lines_and_letters_and_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"a": "grüße 👩‍💻",\n\t"b": 1}\r\n'.encode()
    pieces = [text[at : at + 1] for at in range(len(text))]  # a letter in several of them
    assert on_a_terminal(monkeypatch, commands._print_body, *pieces) == text.replace(b"\r\n", b"\n")
    assert on_a_terminal(monkeypatch, commands._print_body, b"one\r", b"two\r") == rb"one\rtwo\r" + b"\n"
    assert on_a_terminal(monkeypatch, commands._print_body, HARMFUL, b"\x1b[31mred") == HARMLESS + rb"\x1b[31mred" + b"\n"
    assert on_a_terminal(monkeypatch, commands._print_body, b"half \xf0\x9f") == rb"half \xf0\x9f" + b"\n"


def test_the_events_of_a_stream_on_a_terminal_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_terminal(monkeypatch, commands._print_events, b"data: " + HARMFUL + b"\n\ndata: [DONE]\n") == HARMLESS + b"\n"


def test_a_log_on_a_terminal_keeps_its_colours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = on_a_terminal(monkeypatch, commands._print_log, b"\x1b[1;3", b"2mINFO\x1b[0m up\r\n", HARMFUL, b"\nno end")
    assert shown == b"\x1b[1;32mINFO\x1b[0m up\x1b[0m\n" + HARMLESS + b"\nno end\n"


@pytest.mark.parametrize("words", [["status"], ["logs", "echo"]])
def test_a_terminal_with_few_letters_is_no_error(platform: Platform, words: list[str]) -> None:
    platform.call("echo", "/say", "POST", "grün 👩‍💻".encode())
    ours, theirs = pty.openpty()
    env = clean_environment(PYTHONIOENCODING="ascii", COLUMNS="200")
    command = [str(BIN / "relight"), *words, "--state-dir", str(platform.state)]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=env, timeout=60, check=False)
    os.close(theirs)
    shown = os.read(ours, 65536).decode("ascii")
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (r"\u25cf ready" if words == ["status"] else r"gr\xfcn \U0001f469") in shown


def test_where_a_program_reads_it_a_log_is_as_it_was_written(platform: Platform) -> None:
    platform.call("echo", "/say", "POST", b"\x1b[31m\x1b[2Jx")
    assert "\x1b[31m\x1b[2Jx\n" in relight("logs", "echo", state=platform.state).stdout


def test_a_reader_who_has_read_enough_is_no_answer_that_was_cut(platform: Platform) -> None:
    words = [str(BIN / "relight"), "invoke", "echo", "--data", json.dumps("x" * 100), "--state-dir", str(platform.state)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(), text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "cut off" not in process.stderr.read()


def test_what_an_answer_is_called_cannot_look_like_a_line_of_ours(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> None:
    read_status = http.client.HTTPResponse._read_status  # type: ignore[attr-defined]
    evil = "HTTP/1.1", 500, "bad\x1b[2J\x9b\u202e"
    monkeypatch.setattr(http.client.HTTPResponse, "_read_status", lambda reply: (read_status(reply), evil)[1])
    monkeypatch.setattr(commands, "_print_body", lambda _: True)
    said = CliRunner().invoke(commands.invoke, ["echo", "--admin", f"http://127.0.0.1:{platform.admin_port}"]).output
    assert said == "Error: echo answered 500 bad\\x1b[2J\\x9b\\u202e\n"


def test_an_error_of_the_platform_that_quotes_others_is_set_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PlatformError("the pod said: \x1b[2J\nError: all is well")

    monkeypatch.setattr(commands, "Client", fail)
    said = CliRunner().invoke(commands.status, ["--admin", "http://127.0.0.1:1"]).output
    assert said == "Error: the pod said: \\x1b[2J\n  │ Error: all is well\n"


def test_in_a_terminal_a_state_has_a_sign_and_a_failure_its_reason() -> None:
    pod = {"name": "[x]-1", "phase": "ready", "concurrency": 1, "started_at": 1.0, "restarts": {"function": 2}}
    pod["weights"] = {"source": "cache", "bytes": 91_600_000}
    found = {
        "name": "[x]",
        "namespace": "other",
        "state": "failed",
        "desired": 2,
        "concurrency": 1,
        "queued": 3,
        "requests_total": 4,
        "latency": {"p50": 0.001, "p95": 0.05, "p99": None},
        "cold_starts": [{"outcome": "failed", "seconds": 2.0}],
        "url": "http://x/",
        "failure": "[boom]",
        "pods": [pod],
        "revisions": [
            {"name": f"x-{number}", "state": "ready", "percent": percent, "tags": tags, "ready": 1, "desired": 2, "concurrency": 0}
            | {"requests_total": 7}
            for number, percent, tags in ((1, 90, {}), (2, 10, {"next": "http://next-x/"}))
        ],
    }
    in_queue: dict[str, Any] = {"depth": 70, "in_flight": 8, "oldest_age_s": 12.3, "dead": None, "problem": None}
    source = in_queue | {"name": "events", "namespace": "other", "phase": "failed", "queue": "work", "queue_url": "http://q/work"}
    source |= {"sink": "[x]", "done": 31, "retried": 4, "restarts": {"poll": 6}, "exits": {"poll": "ended with status 3"}}
    queues = [in_queue | {"name": "work", "url": "http://q/work"}, in_queue | {"name": "results", "url": "http://q/results", "dead": 5}]
    document = {"now": 9.0, "services": [found], "manifests": {"problem": "a.yaml: [broken]"}, "queue_sources": [source], "queues": queues}
    screen = io.StringIO()
    Console(file=screen, width=200).print(tables.rich(document))
    text = screen.getvalue()
    for expected in (
        "other/[x]",
        "✕ failed",
        "1/2",
        "1.0 ms",
        "50 ms",
        "failed 2.00 s",
        "● ready",
        "91.6 MB from cache",
        "[boom]",
        "90 %",
        "next",
        "[broken]",
        "other/events",
        "12 s",
        "results",
        "other/events is started again and again: poll ended with status 3",
    ):
        assert expected in text, text


def test_the_commands_are_imported_without_the_platforms_own_libraries() -> None:
    code = "import knative.local.commands, sys; print(*sorted({'aiohttp', 'pydantic', 'yaml', 'rich.live'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
