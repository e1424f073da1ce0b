"""A platform's own beginning and end: what stops it from starting, and that nothing outlives it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.knative.local.running import Platform, command, manifests, platform_running, service
from tests.support import BIN, clean_environment, free_port, running, wait_until

MARK = "STARTED_BY_TEST"  # every process of a platform inherits it, as --env says
END_S = 60.0  # much less than `timeoutSeconds`, for which the requests that are held would wait

# Goes on after SIGTERM, and has a child in a group of its own that does too.
STUBBORN = "trap '' TERM; sleep 600 & while :; do sleep 0.1; done"


@pytest.fixture
def mark() -> str:
    return uuid.uuid4().hex


def marked(mark: str) -> list[str]:
    """What is left of the processes that were started under this mark."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # One that has ended and waits to be reaped has no environment any more.
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@contextlib.contextmanager
def standing(state: Path, mark: str) -> Iterator[Platform]:
    """A platform with a ready pod, one that will not end by itself, and one that is just starting."""
    stubborn = {"name": "stubborn", "command": ["sh", "-c", STUBBORN]}
    services = [service("ready"), service("stuck", stubborn), service("starting", env={"GATE": "never"})]
    with platform_running(state, services, "--env", MARK, **{MARK: mark}) as platform:
        platform.call("ready")
        platform.call("stuck")
        yield platform


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_platform_that_is_told_to_stop_leaves_nothing_behind_within_seconds(tmp_path: Path, mark: str, number: signal.Signals) -> None:
    with standing(tmp_path, mark) as platform, platform.calls("starting", 2) as held:
        platform.wait_for("starting", "two held", lambda found: found["queued"] == 2)
        assert len(marked(mark)) >= 4
        began = time.monotonic()
        os.killpg(platform.server.process.pid, number)  # as a terminal does
        assert platform.server.wait(END_S) == 0
        assert time.monotonic() - began < END_S
        assert marked(mark) == []
        assert not any((tmp_path / "pods").iterdir())
        assert [line.partition(" ")[2] for line in platform.server.said().splitlines()[-2:]] == ["stopping: ending the pods", "stopped"]
        # Nobody was left without an answer.
        replies = [call.result() for call in held]
        assert [(reply.status, reply.json()["error"]["type"]) for reply in replies] == [(503, "stopping")] * 2


def test_pods_end_with_a_platform_that_was_killed_and_the_next_one_starts_in_its_place(tmp_path: Path, mark: str) -> None:
    with platform_running(tmp_path, [service("ready"), service("other", env={"GATE": "never"})], "--env", MARK, **{MARK: mark}) as platform:
        platform.call("ready", "/first")
        with platform.connection("other"):
            platform.wait_for("other", "its pod", lambda found: found["pods"])
        (pod,) = platform.pods("ready")
        platform.server.signal(signal.SIGKILL)
        platform.server.wait()
        wait_until("the pods' end", lambda: not marked(mark))
        assert (tmp_path / "pods" / pod["name"]).exists()
    with platform_running(tmp_path, [service("ready")], "--env", MARK, **{MARK: mark}) as platform:
        assert platform.call("ready", "/second").status == 200
        assert platform.seen("ready") == ["/first", "/second"]
        assert [folder.name for folder in (tmp_path / "pods").iterdir()] == [platform.pods("ready")[0]["name"]]


def test_a_platform_that_is_told_to_stop_lets_requests_in_flight_finish(tmp_path: Path) -> None:
    with platform_running(tmp_path, [service("ready")]) as platform, platform.calls("ready", 1, "/wait/finish") as calls:
        platform.wait_for("ready", "in its pod", lambda found: [pod["concurrency"] for pod in found["pods"]] == [1])
        platform.server.signal(signal.SIGTERM)
        wait_until("its word", lambda: "stopping" in platform.server.said())
        platform.note("ready", "finish")
        assert calls[0].result().status == 200
        assert platform.server.wait(END_S) == 0


def refused(state: Path, *options: str, file: str | None = None, ports: tuple[int, int] | None = None, stdin: str = "") -> str:
    """What a platform says that does not start: one line, no traceback, and a status that is not 0."""
    port, admin_port = ports or (free_port(), free_port())
    ended = subprocess.run(
        command(state, port, admin_port, *options, file=file),
        input=stdin,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1, ended
    (line,) = ended.stderr.splitlines()
    return line.removeprefix("Error: ")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with manifests that can be run."""
    (tmp_path / "manifests.yaml").write_text(manifests(service("hello")))
    return tmp_path


def test_a_state_directory_that_is_in_use_is_not_shared(tmp_path: Path) -> None:
    with platform_running(tmp_path, [service("hello")]) as platform:
        said = refused(tmp_path)
        assert said == f"--state-dir {tmp_path}: another `relight run` uses it; stop that one or name another directory"
        assert platform.call("hello").status == 200


def test_a_state_directory_that_cannot_be_made_is_named(state: Path) -> None:
    (state / "file").touch()
    said = refused(state / "file", file=str(state / "manifests.yaml"))
    assert said.startswith(f"--state-dir {state}/file: ")


@pytest.mark.parametrize(
    ("taken", "called", "remedy"),
    [
        pytest.param(0, "port", "choose another", id="the port of the Services"),
        pytest.param(1, "the admin port", "choose another with --admin-port", id="the admin port"),
    ],
)
def test_a_port_that_is_taken_is_named(state: Path, taken: int, called: str, remedy: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        said = refused(state, ports=(number, free_port()) if taken == 0 else (free_port(), number))
    assert said == f"{called} {number} on 127.0.0.1 cannot be opened: Address already in use; {remedy}"


def test_the_highest_port_leaves_none_for_the_admin_port_by_default(state: Path) -> None:
    said = subprocess.run(
        [str(BIN / "relight"), "run", str(state / "manifests.yaml"), "--port", "65535", "--state-dir", str(state)],
        env=clean_environment(), capture_output=True, text=True, timeout=60,
    ).stderr  # fmt: skip
    assert said.splitlines() == ["Error: --admin-port: must be named with --port 65535, after which there is none"]


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        ("/no/such/weights=s3://models/hello", "--seed '/no/such/weights=s3://models/hello': there is no directory '/no/such/weights'"),
        ("/usr", "--seed '/usr': must be DIR=s3://bucket/prefix"),
        ("/usr=/models", "--seed '/usr=/models': must be DIR=s3://bucket/prefix"),
        ("/usr=s3://", "--seed '/usr=s3://': must be DIR=s3://bucket/prefix"),
    ],
    ids=["no such directory", "no address", "not in a store", "no bucket"],
)
def test_a_seed_that_cannot_be_is_named(state: Path, seed: str, said: str) -> None:
    assert refused(state, "--seed", seed) == said


# A daemon as they are made: forked twice, in a session of its own, its parents gone; it holds whatever it has been given.
DAEMON = "(setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 0.1; done' &) ; exec sleep 600"


def test_a_platform_that_is_killed_leaves_nothing_to_the_next_one(tmp_path: Path, mark: str) -> None:
    daemon = {"name": "daemon", "command": ["sh", "-c", DAEMON]}
    function = service("forked", container={"command": ["python", "-m", "function"], "readinessProbe": {"httpGet": {"path": "/readyz"}}})
    function["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "FUNCTION_AGENT", "value": "function.agents.echo:Echo"}]
    services = [service("ready", daemon), function]
    with platform_running(tmp_path, services, "--env", MARK, **{MARK: mark}) as platform:
        assert platform.call("ready").status == 200
        wait_until("a fork server", lambda: platform.status()["fork_server"]["warm"])
        platform.call("forked", "/", "POST", {"instances": [1]})
        assert any("setsid" in line or "trap" in line for line in marked(mark))
        os.kill(platform.server.process.pid, signal.SIGKILL)
        platform.server.wait()
        assert any("trap" in line for line in marked(mark))  # what heard no signal
        command_line = command(tmp_path, platform.port, platform.admin_port)
        with running(command_line, tmp_path / "again.log", clean_environment()) as server:
            again = Platform(server, platform.port, platform.admin_port, tmp_path)
            wait_until("the next one", again.status)
            assert marked(mark) == []
            assert again.call("ready").status == 200
            assert "of an earlier `relight run` that was killed" in server.said()
            server.signal(signal.SIGTERM)  # it takes its daemon with it
            server.wait()


def test_the_platform_of_another_state_directory_is_left_alone(tmp_path: Path) -> None:
    with platform_running(tmp_path / "one", [service("hello")]) as one:
        pid = one.call("hello").json()["pid"]
        with platform_running(tmp_path / "two", [service("hello")]) as two:
            assert two.call("hello").status == 200
        assert one.call("hello").json()["pid"] == pid


def test_a_daemon_ends_with_its_pod(tmp_path: Path, mark: str) -> None:
    services = [service("ready", {"name": "daemon", "command": ["sh", "-c", DAEMON]}, scale={"window": "6s"})]
    with platform_running(tmp_path, services, "--env", MARK, **{MARK: mark}) as platform:
        assert platform.call("ready").status == 200
        wait_until("the daemon", lambda: any("trap" in line for line in marked(mark)))
        platform.wait_for("ready", "no pods", lambda found: not found["pods"])
        wait_until("its end", lambda: not any("trap" in line for line in marked(mark)))


def test_a_default_service_that_is_not_there_is_named_with_those_that_are(state: Path) -> None:
    assert refused(state, "--default-service", "hallo") == "--default-service 'hallo': there is no such Service; there are hello"


def test_a_mistake_in_a_manifest_stops_the_start(state: Path) -> None:
    (state / "manifests.yaml").write_text(manifests(service("hello", spec={"containerConcurrency": -1})))
    where = f"{state}/manifests.yaml: document 1 (Service hello): spec.template.spec.containerConcurrency"
    assert refused(state) == f"{where}: Input should be greater than or equal to 0 (found -1)"


def test_a_secret_that_is_in_no_manifest_stops_the_start_and_not_the_first_request(state: Path) -> None:
    (state / "manifests.yaml").write_text(manifests(service("hello", container={"envFrom": [{"secretRef": {"name": "lost"}}]})))
    said = refused(state)
    where = f"{state}/manifests.yaml: document 1 (Service hello): spec.template.spec.containers[0].envFrom[0].secretRef"
    assert said == f"{where}: found Secret 'lost', which is in no manifest here; in namespace default there are none"


def test_a_manifest_that_is_not_there_is_named(state: Path) -> None:
    assert refused(state, file="nowhere.yaml").startswith("nowhere.yaml: cannot be read: ")


def test_a_mistake_in_what_is_piped_in_is_told_with_its_line(state: Path) -> None:
    assert refused(state, file="-", stdin="a: [1\n").startswith("standard input: line 2: not YAML: ")


def test_another_service_can_be_the_default(tmp_path: Path) -> None:
    services: Sequence[dict[str, object]] = [service("first"), service("second")]
    with platform_running(tmp_path, services, "--default-service", "second") as platform:
        assert platform.call("whatever", "/here").status == 200
        assert (platform.seen("first"), platform.seen("second")) == ([], ["/here"])


def test_a_new_state_directory_is_its_users_alone(tmp_path: Path) -> None:
    state = tmp_path / "state"
    manifest = tmp_path / "hello.yaml"
    manifest.write_text(manifests(service("hello")))
    port, admin_port = free_port(), free_port()
    with running(command(state, port, admin_port, file=str(manifest)), tmp_path / "run.log", clean_environment()):
        wait_until("its state directory", state.exists)
        assert state.stat().st_mode & 0o777 == 0o700


def test_a_hang_up_while_it_starts_is_taken_once_it_runs(tmp_path: Path) -> None:
    (tmp_path / "manifests.yaml").write_text(manifests(service("hello")))
    with running(command(tmp_path, free_port(), free_port()), tmp_path / "run.log", clean_environment()) as server:

        def blocks_it() -> bool:
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
            return bool(int(mask, 16) & 1 << signal.SIGHUP - 1)

        wait_until("the command", blocks_it)
        assert server.said() == ""  # nothing has been started
        server.signal(signal.SIGHUP)
        wait_until("read again", lambda: server.process.poll() is not None or "manifests read again (SIGHUP)\n" in server.said())
        assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        assert server.wait(END_S) == 0
