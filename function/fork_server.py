"""`python -m function.fork_server FD`: a process that has imported everything, and becomes `python -m function` as often as it is asked.

Whoever starts it (the local platform) holds the other end of the socket FD, and is told `warm` there. Each message on it asks for one
process and carries the socket of a conversation with that process alone. It is answered, in turn, with the process id, 0 if there is
none. In the conversation, which may begin at once or long after,

1. the platform sends the log's file, and an order, one line of JSON: `env`, `cwd` (or null), and `parent`, its own process id;
2. the new process says `ready`; or `refused: …`, and ends;
3. the platform answers with a line, and `python -m function` runs. Without it the process ends: nobody would look after it.

The new process is no child of this one. It is forked by a process in between that ends at once, and so falls to the platform, which is to
be a subreaper meanwhile: it has its own parent to report to, to be ended by and to die with, whatever happens here. This process keeps
nothing of it: no file, no memory, no process id.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from function import server

WARM = b"warm"
PROGRAM = "function"
# What functions import besides our server: what agents need, as far as it is installed here.
_LIBRARIES = ("torch", "tokenizers", "weights_cache.restore", "function.agents.minilm", "function.agents.smollm2")
_OURS = ("function", "weights_cache")
CHANGED = "our code has changed"
ADOPTION_S = 5.0

_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the platform is gone; in each process that is forked off, be `python -m function`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    _warm_up()
    control.send(WARM)
    conversation, code = _serve(control)
    # From here on we are a function's process.
    control.close()
    _become(conversation, code)
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)


def _warm_up() -> None:
    """Import everything. Ends the process if that started a thread, which no fork would have."""
    for name in _LIBRARIES:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    if threads := [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]:
        sys.exit(f"fork server: imports have started {len(threads)} threads, which a forked function would lack")
    gc.collect()
    gc.disable()  # until there is a function: what is collected here would be copied for each
    gc.freeze()


def _serve(control: socket.socket) -> tuple[socket.socket, dict[str, int]]:
    """Fork once for each message; returns in the new processes alone, with their conversation and the stamps of what was imported."""
    code = _stamps()
    told, tell = os.pipe()  # by the process in between, which knows the process id
    while True:
        message, files, _, _ = socket.recv_fds(control, 16, 1)
        if not message:
            os._exit(0)  # the platform is gone
        if _stamps() != code:
            sys.stderr.write(f"fork server: {CHANGED}; it takes a new process to run it\n")
            os._exit(1)
        sys.stdout.flush()
        sys.stderr.flush()
        between = _fork()
        if between == 0:
            new = _fork()
            if new == 0:
                os.close(told)
                os.close(tell)
                return socket.socket(fileno=files[0]), code
            os.write(tell, b"%d" % max(new, 0))
            os._exit(0)
        for file in files:
            os.close(file)
        if between > 0:
            os.waitpid(between, 0)
        control.send(os.read(told, 16) if between > 0 else b"0")


def _fork() -> int:
    """As os.fork, but -1 if that is not possible."""
    try:
        return os.fork()
    except OSError as error:
        sys.stderr.write(f"fork server: cannot fork: {error}\n")
        return -1


def _become(conversation: socket.socket, code: dict[str, int]) -> None:
    """Make this process what the platform would have started; ends it if that is not possible or not wanted any more."""
    os.setsid()
    with conversation, conversation.makefile("rb") as lines:
        _, logs, _, _ = socket.recv_fds(conversation, 1, 1)
        line = lines.readline()
        if not line:
            os._exit(1)
        server.asked_at = time.monotonic()
        for output in (1, 2):
            os.dup2(logs[0], output)
        os.close(logs[0])
        order = json.loads(line)
        _wait_for_adoption(order["parent"])
        try:
            if reason := CHANGED if _stamps() != code else _enter(order):
                conversation.sendall(f"refused: {reason}\n".encode())
                os._exit(1)
            conversation.sendall(b"ready\n")
            wanted = lines.readline()
        except OSError:
            wanted = b""
        if not wanted:
            os._exit(1)
    _rename()
    gc.enable()


def _enter(order: dict[str, Any]) -> str | None:
    """Take over the working directory and the environment; returns why this process could not be what a fresh one would be."""
    if order["cwd"] is not None:
        try:
            os.chdir(order["cwd"])
        except OSError as error:
            return f"{order['cwd']}: {error.strerror}"
        if hidden := sorted(_shadowed()):
            return f"{order['cwd']} has {', '.join(hidden)} of its own"
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd())  # where `python -m` looks first
    importlib.invalidate_caches()
    sys.argv = ["-m"]  # runpy puts the program in its place
    sys.orig_argv[1:] = ["-m", PROGRAM]
    return None


def _shadowed() -> Iterator[str]:
    """Modules that are loaded here, and of which the working directory has others: a fresh process would load those."""
    loaded = {name for name in sys.modules if "." not in name}
    for entry in os.scandir():
        name = entry.name.partition(".")[0]
        is_module = entry.name.endswith((".py", ".so")) or (entry.is_dir() and Path(entry, "__init__.py").exists())
        if is_module and name in loaded:
            yield name


def _wait_for_adoption(parent: int) -> None:
    """Return once the process in between is gone and we are the platform's; from then on, if it dies, we are told to end."""
    end = time.monotonic() + ADOPTION_S
    while os.getppid() != parent:
        if time.monotonic() > end:
            os._exit(1)
        time.sleep(0.0005)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _rename() -> None:
    """Let `ps` show what this process is now: the command that it was started with is overwritten in place."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    command = b"\0".join(os.fsencode(word) for word in (sys.executable, "-m", PROGRAM))
    if start and len(command) < end - start:
        with contextlib.suppress(OSError), Path("/proc/self/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(command.ljust(end - start, b"\0"))


def _stamps() -> dict[str, int]:
    """When each file of ours that is loaded was changed last."""
    stamps = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _OURS and (file := getattr(module, "__file__", None)):
            try:
                stamps[file] = Path(file).stat().st_mtime_ns
            except OSError:
                stamps[file] = 0
    return stamps


if __name__ == "__main__":
    main()
