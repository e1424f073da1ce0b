"""An agent is a Python program: what it forks, prints and leaves is as in a Python of its own. A worker that dies ends its container."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from function import children, process
from tests.support import BIN, ROOT, Server, clean_environment, free_port, request, running, wait_until

AGENTS = '''
import atexit, concurrent.futures, ctypes, faulthandler, multiprocessing, os, resource, signal, subprocess, sys, tempfile, threading, time


def what_i_am(_=None):
    """What a process has of its own: signal handlers, what may wake it, files."""
    handlers = {str(int(number)): repr(signal.getsignal(number)) for number in signal.valid_signals()}
    files = []
    for name in os.listdir("/proc/self/fd"):
        try:
            files.append(os.readlink(f"/proc/self/fd/{name}").split(":")[0])
        except OSError:
            pass
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # only a main thread may
    mask = sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
    return {"handlers": handlers, "wakes": signal.set_wakeup_fd(-1), "mask": mask, "files": sorted(set(files) - {"pipe", "/dev/null"})}


def tell(pipe):
    pipe.send(what_i_am())
    time.sleep(600)


def child(method):
    """What a child is, and how SIGTERM ends it."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    process = context.Process(target=tell, args=(theirs,), daemon=True)
    process.start()
    told = ours.recv()
    process.terminate()
    process.join()
    return [told, process.exitcode]


def grandchild(pipe):
    """A child with a handler and a file of its own has children that have them, too."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(42))
    file = os.open("/", os.O_RDONLY)
    pid = os.fork()
    if pid == 0:
        os.readlink(f"/proc/self/fd/{file}")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    pipe.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def great_grandchild():
    ours, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("fork").Process(target=grandchild, args=(theirs,)).start()
    return ours.recv()


def terminate_at_once(times):
    codes = []
    for _ in range(times):
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        process.start()
        process.terminate()
        process.join()
        codes.append(process.exitcode)
    return codes


def pools(times):
    for _ in range(times):
        with multiprocessing.Pool(2) as pool:
            assert pool.map(abs, [1, -2]) == [1, 2]
    return "done"


def an_executor():
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        return list(executor.map(abs, [1, -2]))


def talk(times):
    for number in range(times):
        pid = os.fork()
        if pid == 0:
            print("a child says", number)
            print("and complains", number, file=sys.stderr)
            os._exit(0)
        os.waitpid(pid, 0)
    return "done"


def run(command):
    return subprocess.Popen(command).pid


def run_to_its_end(command):
    return subprocess.run(command).returncode


def keep_children():
    """One that plain Python would wait for, one that it ends."""
    for daemon in (False, True):
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=daemon).start()
    return [process.pid for process in multiprocessing.active_children()]


def keep_pools():
    global pool, executor
    pool, executor = multiprocessing.Pool(2), concurrent.futures.ProcessPoolExecutor(2)
    return [*pool.map(abs, [1]), *executor.map(abs, [1])]


def kill(number):
    os.kill(os.getpid(), number)
    time.sleep(600)


def leave(status):
    os._exit(status)


def crash():
    ctypes.string_at(0)


def limit():
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def parent():
    return os.getppid()


def pid():
    return os.getpid()


def at_exit(where):
    global folder
    atexit.register(say_goodbye)
    folder = tempfile.TemporaryDirectory(dir=where)
    return folder.name


def hang_at_exit():
    atexit.register(never_return)


def set_a_handler():
    signal.signal(signal.SIGALRM, lambda *_: None)


def fail():
    raise OSError("the tokenizer is missing")


def say(text):
    print(text)


def complain(text):
    print(text, file=sys.stderr)


def say_goodbye():
    print("goodbye from", threading.current_thread() is threading.main_thread(), end="")  # no line's end, so not written by itself


def never_return():
    print("now it hangs")
    time.sleep(600)


class Does:
    def load(self, weights, device):
        for wish in eval(os.environ.get("AT_LOAD", "[]")):
            self.do(*wish)

    def do(self, name, *about):
        return globals()[name](*about)

    def predict(self, inputs):
        return [self.do(*wish) for wish in inputs]

    def close(self):
        print("closed")


class Noisy(Does):
    """Other threads write all the time."""

    def load(self, weights, device):
        for file in (sys.stdout, sys.stderr):
            threading.Thread(target=self.write, args=(file,), daemon=True).start()

    def write(self, file):
        for _ in range(20_000):  # 100 MB at most, however long it takes
            print("." * 5000, file=file)
            time.sleep(0.0005)
'''

StartFunction = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFunction]:
    (tmp_path / "doing_agents.py").write_text(AGENTS)
    with ExitStack() as stack:

        def begin(*at_load: list[Any], agent: str = "doing_agents:Does", command: tuple[str, ...] = (), **settings: Any) -> Server:
            port = free_port()
            env = clean_environment(PYTHONPATH=str(tmp_path), PORT=str(port), FUNCTION_HOST="127.0.0.1", FUNCTION_AGENT=agent)
            env |= {"FUNCTION_TIMEOUT_S": "100", "AT_LOAD": repr(at_load), **{name: str(value) for name, value in settings.items()}}
            env.pop("PYTHONUNBUFFERED", None)
            return stack.enter_context(running([*command, str(BIN / "python"), "-m", "function"], tmp_path / f"{port}.log", env, port))

        yield begin


def do(function: Server, *wish: Any) -> Any:
    """Have the agent do something in `predict`; what it gives."""
    reply = request(function.port, "POST", "/v1/models/model:predict", {"instances": [wish]}, timeout=120)
    assert reply.status == 200, (reply.body, function.said())
    return reply.json()["predictions"][0]


def do_not_wait(function: Server, *wish: Any) -> None:
    with suppress(OSError, HTTPException):
        do(function, *wish)


def in_plain_python(folder: Path, expression: str) -> Any:
    """The value of an expression in the agents' module, in a process without a server."""
    (folder / "plain.py").write_text(
        f"import json, doing_agents\nif __name__ == '__main__':\n    print(json.dumps(doing_agents.{expression}))\n"
    )
    told = subprocess.run([sys.executable, folder / "plain.py"], stdin=subprocess.DEVNULL, capture_output=True, check=True, cwd=ROOT)
    return json.loads(told.stdout)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def commands() -> list[str]:
    """The command of each process of this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found.append((entry / "cmdline").read_text().replace("\0", " "))
    return found


# What is forked


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_child_has_what_a_child_of_plain_python_has_and_ends_on_sigterm(start: StartFunction, tmp_path: Path, method: str) -> None:
    function = start(FUNCTION_METRICS_PORT=free_port()).ready()
    with socket.create_connection(("127.0.0.1", function.port)):  # an idle caller's
        told, exit_code = do(function, "child", method)
    plain, plain_exit_code = in_plain_python(tmp_path, f"child('{method}')")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:  # as in the background of a shell; gunicorn sets them back in between
            del told["handlers"][str(int(number))], plain["handlers"][str(int(number))]
    log_file = str(function.log)
    assert [file for file in told["files"] if file != log_file] == [file for file in plain["files"] if file != log_file]
    assert {key: told[key] for key in ("handlers", "wakes", "mask")} == {key: plain[key] for key in ("handlers", "wakes", "mask")}
    assert (exit_code, plain_exit_code) == (-15, -15)


def test_a_child_ends_on_a_sigterm_that_comes_as_soon_as_it_is_there(start: StartFunction) -> None:
    assert do(start().ready(), "terminate_at_once", 100) == [-15] * 100


def test_what_a_child_has_made_of_itself_is_its_own_childrens_too(start: StartFunction) -> None:
    assert do(start().ready(), "great_grandchild") == 42


def test_a_child_lets_go_of_the_rest_if_something_was_closed_just_then() -> None:
    reader, writer = os.pipe()
    children._abandon([-1, writer])
    assert os.read(reader, 1) == b""  # nobody writes there any more
    os.write(writer, b"x")  # but the number is not free for something else
    os.close(reader)
    os.close(writer)


def test_pools_work_time_and_again_while_it_loads_and_while_it_predicts(start: StartFunction) -> None:
    function = start(["pools", 50]).ready()
    assert do(function, "pools", 50) == "done"
    assert do(function, "an_executor") == [1, 2]


def test_a_child_can_print_whatever_other_threads_were_writing_when_it_was_forked(start: StartFunction) -> None:
    function = start(agent="doing_agents:Noisy").ready()
    assert do(function, "talk", 100) == "done"
    said = function.said().splitlines()
    for number in range(100):
        assert f"a child says {number}" in said
        assert f"and complains {number}" in said


def test_a_loader_of_torch_has_workers(start: StartFunction, tmp_path: Path) -> None:
    (tmp_path / "loading_agent.py").write_text(
        "import torch\n"
        "class Loads:\n"
        "    def load(self, weights, device): pass\n"
        "    def predict(self, inputs):\n"
        "        loader = torch.utils.data.DataLoader(list(range(8)), batch_size=2, num_workers=2)\n"
        "        return [[batch.tolist() for batch in loader] for _ in inputs]\n"
    )
    function = start(agent="loading_agent:Loads").ready()
    for _ in range(3):
        assert do(function, "go") == [[0, 1], [2, 3], [4, 5], [6, 7]]


# What is left


DAEMON = "(setsid sh -c 'trap \"\" TERM HUP; while :; do sleep 0.1; done; : {mark}' &) ; exec sleep 600"


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "a killed worker", "a failure"])
def test_nothing_that_the_agent_has_started_is_left_at_the_end(start: StartFunction, tmp_path: Path, end: str) -> None:
    mark = f"mark-{tmp_path}"
    function = start().ready()
    do(function, "run", ["sh", "-c", DAEMON.format(mark=mark)])
    do(function, "keep_children")
    do(function, "keep_pools")
    wait_until("the daemon", lambda: sum(mark in command for command in commands()) == 1)
    worker = do(function, "pid")
    below = children.descendants(function.process.pid)
    assert len(below) >= 9  # the worker, a shell, its daemon, two children, two and two of the pools
    match end:
        case "a killed worker":
            os.kill(worker, signal.SIGKILL)
        case "a failure":
            do_not_wait(function, "leave", 7)
        case _:
            function.signal(getattr(signal, end))
    function.wait()
    assert [pid for pid in below if is_running(pid)] == []
    assert not any(mark in command for command in commands())
    with socket.create_server(("127.0.0.1", function.port)):  # nobody has it
        pass


def test_a_server_whose_first_process_is_killed_leaves_no_children_either(start: StartFunction) -> None:
    function = start().ready()
    kept = do(function, "keep_children")
    worker = do(function, "pid")
    function.signal(signal.SIGKILL)
    wait_until("the end", lambda: not any(is_running(pid) for pid in [*kept, worker]))


# The end


def test_sigterm_closes_the_agent_and_runs_what_is_to_be_done_at_exit(start: StartFunction, tmp_path: Path) -> None:
    function = start().ready()
    folder = do(function, "at_exit", str(tmp_path))
    function.signal(signal.SIGTERM)
    assert function.wait() == 0
    assert function.said().endswith("closed\ngoodbye from True")
    assert not Path(folder).exists()


def test_sigterm_is_heard_by_a_worker_that_has_just_been_forked(start: StartFunction, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os, time\nos.register_at_fork(after_in_child=lambda: time.sleep(1))\n")
    function = start()
    wait_until("the worker", lambda: children.descendants(function.process.pid))
    function.signal(signal.SIGTERM)
    assert function.wait() == 0  # long before the grace time is over


@pytest.mark.parametrize("when", ["ready", "loading"])
def test_a_worker_that_alone_is_told_to_end_has_not_ended_by_itself(start: StartFunction, when: str) -> None:
    function = start().ready() if when == "ready" else start(["say", "it starts"], ["sleep", 600])
    if when == "loading":
        wait_until("it loads", lambda: "it starts" in function.said())
    (worker,) = children.descendants(function.process.pid)
    os.kill(worker, signal.SIGTERM)
    assert function.wait() == 128 + signal.SIGTERM  # so that whoever runs it does not take it for a start that has failed
    assert function.said().splitlines()[-1].endswith("the function's process was ended by SIGTERM")


def test_sigint_closes_the_agent_and_runs_what_is_to_be_done_at_exit_too(start: StartFunction, tmp_path: Path) -> None:
    function = start().ready()
    folder = do(function, "at_exit", str(tmp_path))
    os.killpg(function.process.pid, signal.SIGINT)  # as a terminal does
    assert function.wait() == 0
    assert function.said().endswith("closed\ngoodbye from True")
    assert not Path(folder).exists()


def test_a_failed_load_runs_what_is_to_be_done_at_exit(start: StartFunction, tmp_path: Path) -> None:
    function = start(["say", "loading"], ["at_exit", str(tmp_path)], ["fail"])
    assert function.wait() == 3
    assert "loading\n" in function.said()
    assert function.said().endswith("OSError: the tokenizer is missing\ngoodbye from True")
    assert list(tmp_path.glob("tmp*")) == []


def test_what_hangs_at_the_end_is_cut_off_and_named(start: StartFunction) -> None:
    function = start().ready()
    do(function, "hang_at_exit")
    function.signal(signal.SIGTERM)
    assert function.wait() == 0
    assert "now it hangs\n" in function.said()
    assert "the end of the process was cut off: it took too long in never_return (" in function.said().splitlines()[-1]


def test_what_hangs_after_a_failure_keeps_no_caller_waiting(start: StartFunction) -> None:
    function = start(["hang_at_exit"], ["fail"])
    wait_until("the end", lambda: "now it hangs" in function.said())
    with pytest.raises(ConnectionRefusedError):
        request(function.port, "GET", "/readyz")
    assert function.process.poll() is None
    assert function.wait() == 3


def test_lines_are_there_at_once_and_in_order(start: StartFunction) -> None:
    function = start(["say", "loading"]).ready()
    assert "loading\n" in function.said()
    for name in ("say", "complain", "say", "complain"):
        do(function, name, f"{name}ing")
    assert [line for line in function.said().splitlines() if line.endswith("ing")] == [
        "loading",
        "saying",
        "complaining",
        "saying",
        "complaining",
    ]


def test_no_text_is_refused_by_print(start: StartFunction) -> None:
    function = start(["say", "h\u00e9 \ud800"], LC_ALL="C", PYTHONIOENCODING="ascii").ready()
    assert "h\\xe9 \\ud800\n" in function.said()


# A worker that dies


@pytest.mark.parametrize(
    ("wish", "status", "last"),
    [
        (
            ["kill", signal.SIGKILL],
            137,
            "was ended by SIGKILL: the kernel may have ended it for want of memory; raise the container's memory limit",
        ),
        (["kill", signal.SIGILL], 132, "was ended by SIGILL: native code has failed; above is where Python was"),
        (["crash"], 139, "was ended by SIGSEGV: native code has failed; above is where Python was"),
        (["leave", 0], 0, "ended by itself with status 0"),
        (["leave", 3], 3, "ended by itself with status 3"),
        (["leave", 77], 77, "ended by itself with status 77"),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("when", ["load", "predict"])
def test_a_worker_that_dies_ends_the_server_with_its_status_and_one_line(
    start: StartFunction, wish: list[Any], status: int, last: str, when: str
) -> None:
    wish = [int(part) if isinstance(part, int) else part for part in wish]
    before = ["say", "it starts"]
    if when == "load":
        function = start(before, wish)
    else:
        function = start(before).ready()
        do_not_wait(function, *wish)
    assert function.wait() == status
    assert function.said().splitlines()[-1].partition(" ERROR relight.function: ")[2] == f"the function's process {last}"
    assert function.said().count("it starts") == 1


def test_a_crash_in_native_code_leaves_pythons_stack(start: StartFunction) -> None:
    function = start().ready()
    do_not_wait(function, "crash")
    function.wait()
    assert "Fatal Python error: Segmentation fault" in function.said()
    assert 'doing_agents.py", line' in function.said()
    assert " in predict\n" in function.said()


def test_nobody_is_told_to_come_again_by_a_server_whose_worker_has_died(start: StartFunction) -> None:
    function = start().ready()
    do(function, "run", ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"])  # keeps the first process for a moment
    os.kill(do(function, "pid"), signal.SIGKILL)
    answers = []
    while function.process.poll() is None:
        with suppress(OSError, HTTPException):
            answers.append(request(function.port, "GET", "/readyz").status)
    assert set(answers) <= {200}
    assert function.wait() == 137


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU, signal.SIGWINCH])
def test_signals_that_mean_something_to_gunicorn_change_nothing(start: StartFunction, number: int) -> None:
    function = start().ready()
    worker = do(function, "pid")
    function.signal(number)
    for _ in range(3):
        assert do(function, "pid") == worker
    assert len(children.descendants(function.process.pid)) == 1


# What else a program is given


def test_an_agent_that_sets_a_signal_handler_is_told_why_it_may_not(start: StartFunction) -> None:
    function = start(["set_a_handler"])
    assert function.wait() == 3
    assert "ValueError: signal only works in main thread" in function.said()
    assert "only the main thread of a process may set signal handlers" in function.said().splitlines()[-1]


def test_an_error_that_says_enough_is_not_explained() -> None:
    assert process.explain(ValueError("signal is too weak")) is None
    assert process.explain(None) is None


def test_the_cause_of_an_error_is_explained() -> None:
    error = RuntimeError("no event loop")
    error.__cause__ = ValueError("set_wakeup_fd only works in main thread of the main interpreter")
    assert process.explain(error)


def test_the_limit_of_open_files_is_raised(start: StartFunction) -> None:
    function = start(command=("sh", "-c", 'ulimit -Sn 200; exec "$@"', "sh")).ready()
    hard = int(subprocess.run(["sh", "-c", "ulimit -Hn"], capture_output=True, text=True, check=True).stdout)
    assert do(function, "limit") == min(hard, process.OPEN_FILES)


def test_a_lower_hard_limit_of_open_files_is_as_good(start: StartFunction) -> None:
    function = start(command=("sh", "-c", 'ulimit -n 300; exec "$@"', "sh")).ready()
    assert do(function, "limit") == 300


def test_without_standard_input_its_number_is_nobodys_socket(start: StartFunction, tmp_path: Path) -> None:
    function = start(command=("sh", "-c", 'exec "$@" <&-', "sh")).ready()
    do(function, "run", ["sh", "-c", f"readlink /proc/self/fd/0 > {tmp_path}/input"])
    wait_until("the child", lambda: (tmp_path / "input").exists() and (tmp_path / "input").read_text())
    assert (tmp_path / "input").read_text() == "/dev/null\n"


CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_be_the_first_process() -> bool:
    return subprocess.run([*CONTAINER, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_be_the_first_process(), reason="this machine lets nobody make a namespace of processes")
def test_as_the_first_process_of_a_container_it_takes_care_of_orphans_and_ends_on_sigterm(start: StartFunction) -> None:
    function = start(command=CONTAINER).ready()
    assert do(function, "parent") == 1
    first, worker = sorted(children.descendants(function.process.pid))
    do(function, "run_to_its_end", ["sh", "-c", "sleep 0.1 &"])
    wait_until("no orphan", lambda: children.descendants(first) == {worker})
    os.kill(first, signal.SIGTERM)
    assert function.wait() == 0
