"""`python -m function.fork_server FD ORDER`: a process that has imported everything, and becomes `python -m function` as often as asked.

ORDER is a file, by its number, that says what functions import besides our server: `warm_imports.Order` as JSON. Whoever starts it (the
local platform) holds the other end of the socket FD, and is told there `importing LIBRARY` before each; then `warm`, with what it holds
as JSON, or `without`, with a library that cannot be held and why. After the latter it ends: there is to be another one without it.

After `warm`, each message asks for one process and carries the socket of a conversation with that process alone. It is answered, in
turn, with the process id, 0 if there is none. In the conversation, which may begin at once or long after,

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
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from function import cpus, server, warm_imports
from function.import_traces import OURS
from function.warm_imports import Importer, LeftOut, Order

PROGRAM = "function"
# What many functions import, as far as it is installed here.
_LIBRARIES = ("torch", "tokenizers", "weights_cache.restore", "function.agents.minilm", "function.agents.smollm2")
CHANGED = "our code has changed"
REPLACED = "packages have been installed or removed"
ADOPTION_S = 5.0
# What a fresh process has imported before it looks for its agent.
_BEFORE_AGENT = frozenset(name for name in sys.modules if "." not in name)

_encode = json.JSONEncoder().encode  # of now: what a library does to `json.dumps` is still to be told
_prctl = ctypes.CDLL(None).prctl
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the platform is gone; in each process that is forked off, be `python -m function`."""
    control = socket.socket(fileno=int(sys.argv[1]))
    held = _warm_up(control, Order(**json.loads(Path(f"/proc/self/fd/{sys.argv[2]}").read_bytes())))
    os.close(int(sys.argv[2]))
    conversation = _serve(control, held)
    # From here on we are a function's process.
    control.close()
    _become(conversation, held)
    del held  # it knows variables of others
    runpy.run_module(PROGRAM, run_name="__main__", alter_sys=True)


class _Held:
    """What was imported, and as of when."""

    def __init__(self, importer: Importer, sites: dict[str, int]) -> None:
        self.importer = importer
        self._sites = sites
        self._code = _stamps()

    def outdated(self) -> str | None:
        """Why this is not what a fresh process would import; None if it is."""
        if _stamps() != self._code:
            return CHANGED
        return REPLACED if warm_imports.sites() != self._sites else None


def _warm_up(control: socket.socket, order: Order) -> _Held:
    """Import everything. Ends the process if something is left behind that forks must not have."""
    cpus.limit_waiting()
    sites = warm_imports.sites()  # as they were before anything was read
    importer = Importer(order, lambda library: control.send(f"importing {library}".encode()))
    try:
        importer.run(_LIBRARIES)
    except LeftOut as error:
        sys.stderr.write(f"fork server: {error}\n")
        if error.__cause__:
            traceback.print_exception(error.__cause__)
        sys.stderr.flush()  # first: then this process may be ended at any time
        control.send(b"without " + _encode({"library": error.library, "reason": error.reason, "stamp": error.stamp}).encode())
        os._exit(1)
    if threads := [task for task in Path("/proc/self/task").iterdir() if task.name != str(os.getpid())]:
        sys.exit(f"fork server: imports have started {len(threads)} threads, which a forked function would lack")
    warm_imports.inherited = frozenset(sys.modules)
    ctypes.CDLL(None).fflush(None)  # what native code has printed would be printed by each fork
    gc.collect()
    gc.disable()  # until there is a function: what is collected here would be copied for each
    gc.freeze()
    held = _Held(importer, sites)
    control.send(b"warm " + _encode({"libraries": importer.libraries, "bytes": warm_imports.own_bytes()}).encode())
    return held


def _serve(control: socket.socket, held: _Held) -> socket.socket:
    """Fork once for each message; returns in the new processes alone, with their conversation."""
    told, tell = os.pipe()  # by the process in between, which knows the process id
    while True:
        message, files, _, _ = socket.recv_fds(control, 16, 1)
        if not message:
            os._exit(0)  # the platform is gone
        if reason := held.outdated():
            sys.stderr.write(f"fork server: {reason}; it takes a new process to have it as it is now\n")
            os._exit(1)
        sys.stdout.flush()
        sys.stderr.flush()
        between = _fork()
        if between == 0:
            new = _fork()
            if new == 0:
                os.close(told)
                os.close(tell)
                return socket.socket(fileno=files[0])
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


def _become(conversation: socket.socket, held: _Held) -> None:
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
            if reason := held.outdated() or _enter(order, held.importer):
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


def _enter(order: dict[str, Any], importer: Importer) -> str | None:
    """Take over the working directory and the environment; returns why this process could not be what a fresh one would be."""
    env: dict[str, str] = order["env"]
    if order["cwd"] is not None:
        try:
            os.chdir(order["cwd"])
        except OSError as error:
            return f"{order['cwd']}: {error.strerror}"
        if hidden := sorted(_hidden(Path(), set())):
            return f"{order['cwd']} has {', '.join(hidden)} of its own"
    for folder in filter(None, env.get("FUNCTION_AGENT_PATH", "").split(os.pathsep)):
        if hidden := sorted(_hidden(Path(folder), _BEFORE_AGENT)):
            return f"{folder} has {', '.join(hidden)} of its own"
    if name := importer.disagreement(env):
        return f"{name} is read when libraries are imported, and was another here"
    os.environ.clear()
    os.environ.update(importer.added | env)
    time.tzset()
    if not sys.flags.safe_path:
        sys.path[0] = str(Path.cwd())  # where `python -m` looks first; a library that changes sys.path is not held
    importlib.invalidate_caches()
    importer.generators.differ()
    sys.argv = ["-m"]  # runpy puts the program in its place
    sys.orig_argv[1:] = ["-m", PROGRAM]
    return None


def _hidden(folder: Path, but: Collection[str]) -> Iterator[str]:
    """Modules that are loaded here, without those of `but`, and of which a folder has others: a fresh process would load those."""
    loaded = {name for name in sys.modules if "." not in name and name not in but}
    with contextlib.suppress(OSError):  # a function that needs it will say so
        for entry in os.scandir(folder):
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
        if name.partition(".")[0] in OURS and (file := getattr(module, "__file__", None)):
            try:
                stamps[file] = Path(file).stat().st_mtime_ns
            except OSError:
                stamps[file] = 0
    return stamps


if __name__ == "__main__":
    main()
