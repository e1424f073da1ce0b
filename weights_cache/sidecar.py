"""The sidecar: keeps one WEIGHTS_URI present in the node's cache, and tells how far it is. The agent: the same for all pods of a node.

The sidecar answers its probes before boto3 is imported, starts the pull at once, tries again for as long as it lives, and never has to
be there for a function that already serves. The agent pulls what it is asked for through a unix socket in the cache directory, for
sidecars that can only read it (see `keeper`).
"""

import contextlib
import ctypes
import json
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from weights_cache import prefetch, resident
from weights_cache.access import Access
from weights_cache.cache import NodeCache
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.excerpt import described, quoted
from weights_cache.http_peer import Answer, HttpPeer, Reply, Request, document, refusal
from weights_cache.keeper import SOCKET, Delegate, Filler, Keeper, Pulled, can_only_read
from weights_cache.logs import unhurried
from weights_cache.loop import Loop, Peer, raise_descriptor_limit
from weights_cache.pulls import Busy, Pulls, backoff
from weights_cache.settings import WeightsSettings
from weights_cache.threads import Threads
from weights_cache.uri import WeightsUri

log = logging.getLogger("relight.weights")

TELL_S = 5.0
STOP_S = 1.0  # for pulls to end; what is in the middle of a call to a store that stalls takes longer, and nothing interrupts that
PREPARE_S = 5.0  # for an agent's client of the store
CONNECTIONS = 128  # to each HTTP socket
FUNCTIONS = 256  # connections to the resident tier
QUESTIONS = 32  # that wait for what takes a look at the disk
BACKLOG = 1024
_M_ARENA_MAX = -8  # of malloc.h


class Sidecar:
    """The state behind the HTTP routes: the pulls, what stays on devices, and the threads that work on them."""

    def __init__(self, settings: WeightsSettings, *, pieces: int = resident.MAX_PIECES) -> None:
        """pieces: allocations that may stay on devices."""
        self._settings = settings
        self._stop = threading.Event()
        self._threads = Threads(self.failed)
        self._prefetched = prefetch.parse(settings.prefetch)
        self._is_reader = can_only_read(settings)
        self._access = Access()
        self._metrics_lock = threading.Lock()  # guards _metrics
        self._metrics: Any = None
        self.problem: str | None = None  # for good: a thread has ended that should not have
        kept = dict.fromkeys([*filter(None, [settings.uri]), *self._prefetched.values()])  # whoever asks for them, and whoever does not
        self.pulls = Pulls(self._make_keeper, kept, self.failed)
        self.residents = resident.Residents(settings.resident_bytes, pieces)

    def _make_keeper(self, uri: str, pulls: int) -> Keeper:
        if self._is_reader:
            return Delegate(self._settings, uri, self._count)
        return Filler(self._settings, uri, self._count, self._access, pulls)

    def failed(self, name: str, error: BaseException) -> None:
        """A thread has ended by an exception: this process is one to be replaced."""
        log.error("thread %r ended: %s", name, described(error), exc_info=error)
        self.problem = f"{name} ended unexpectedly: {described(error)}"

    def prepare(self) -> None:
        """Have at hand what every pull needs. An agent will need it, and its memory is then what it stays."""
        self._threads.start("prepare", self._access.prepare)
        self._threads.join(PREPARE_S)

    def start(self, *, agent: bool, look: Callable[[], str | None] = lambda: None) -> None:
        """Begin to keep what is to be kept. look: says, every few seconds, for what reason this process is one to be replaced."""
        if self._settings.uri:
            self._threads.start("keep", self.pulls.keep_present, self._settings.uri)
        if agent and self._prefetched:
            self._threads.start("prefetch", self.bring_ahead)
        self._threads.start("tell", self._tell, look)

    def bring_ahead(self) -> None:
        """Bring what WEIGHTS_PREFETCH names, one after the other, and label the node with what is there."""
        labels = prefetch.NodeLabels(self._settings.node) if self._settings.node else None
        self._label(labels, dict.fromkeys(self._prefetched))
        for name, uri in self._prefetched.items():
            self.pulls.keep_present(uri)
            if self._stop.is_set():
                return
            self._label(labels, {name: self.pulls.keeper(uri).row()["snapshot"]})

    def _label(self, labels: prefetch.NodeLabels | None, snapshots: Mapping[str, str | None]) -> None:
        """Until it works: without the label a Service would look for its weights elsewhere for good."""
        for pause_s in backoff(1, 60):
            if not labels or not snapshots or labels.set(snapshots) or self._stop.wait(pause_s):
                return

    def _tell(self, look: Callable[[], str | None]) -> None:
        """A line in the log every few seconds while weights come, for whoever has nothing but the log to look at."""
        while not self._stop.wait(TELL_S):
            if not self.problem and (problem := look()):
                log.error("%s", problem)
                self.problem = problem
            for row in self.pulls.rows():
                if row["phase"] == "fetching" and row.get("total_bytes"):
                    log.info("%s: %.1f of %.1f MB", row["uri"], row["bytes"] / 1e6, row["total_bytes"] / 1e6)

    def stop(self, seconds: float) -> bool:
        """End all threads; returns whether they have ended within the time."""
        self._stop.set()
        is_over = self.pulls.stop(seconds)
        return self._threads.join(seconds if is_over else 0) and is_over

    def close(self) -> None:
        """Let the weights go; no pull is running any more."""
        self.pulls.close()
        self.residents.close()

    def status(self) -> dict[str, Any]:
        """How the weights of WEIGHTS_URI are, from what is known: without looking at the disk, and without waiting."""
        if self.problem:
            return {"phase": "failed", "error": self.problem}
        if not self._settings.uri:
            return {"phase": "idle", "error": None}
        phase, error = self.pulls.keeper(self._settings.uri).state()
        return {"phase": phase, "error": error}

    def is_ready(self) -> bool:
        """Whether the weights of WEIGHTS_URI are there; what else was asked for is the business of those who did."""
        return not self.problem and (not self._settings.uri or self.pulls.keeper(self._settings.uri).ready)

    def _count(self, pulled: Pulled) -> None:
        self.metrics().count(pulled)

    def metrics(self) -> Any:
        """What has been counted."""
        from weights_cache.metrics import Metrics

        with self._metrics_lock:
            self._metrics = self._metrics or Metrics(self.pulls.keepers, self.residents)
        return self._metrics


class Routes:
    """What is answered over HTTP: probes at once, by the loop's thread, and what has to look at the disk by a thread of its own."""

    def __init__(self, sidecar: Sidecar, *, takes_orders: bool = False) -> None:
        """takes_orders: only who can open the socket in the cache directory may have something fetched."""
        self._sidecar = sidecar
        self._takes_orders = takes_orders
        self._questions: queue.Queue[Callable[[], object] | None] = queue.Queue(QUESTIONS)

    def __call__(self, request: Request, reply: Reply) -> None:
        """Answer, now or later."""
        route, _, query = request.target.partition("?")
        if request.method == "GET" and route == "/healthz":
            problem = self._sidecar.problem
            reply(document(503, {"status": "failed", "error": problem}) if problem else document(200, {"status": "ok"}))
        elif request.method == "GET" and route == "/readyz":
            reply(document(200 if self._sidecar.is_ready() else 503, self._sidecar.status()))
        else:
            try:
                self._questions.put_nowait(partial(self._look, request, route, query, reply))
            except queue.Full:
                reply(refusal(503, "busy", f"{QUESTIONS} others wait for an answer", Retry_After="1"))

    def serve(self) -> None:
        """Answer, in the calling thread, what takes a look, until `stop`."""
        while question := self._questions.get():
            question()

    def stop(self) -> None:
        """Have `serve` return."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._questions.get_nowait()
        self._questions.put(None)

    def _look(self, request: Request, route: str, query: str, reply: Reply) -> None:
        try:
            reply(self._order(request, query) if request.method == "POST" else self._tell(request.method, route, query))
        except Exception as error:
            log.exception("%s cannot be answered", route)
            reply(refusal(500, "internal_error", described(error)))

    def _tell(self, method: str, route: str, query: str) -> Answer:
        if method != "GET":
            return refusal(405, "method_not_allowed", f"{method} is for nothing here", Allow="GET, POST")
        if route == "/v1/snapshots":
            return self._rows(query)
        if route == "/v1/residents":
            return document(200, {"residents": self._sidecar.residents.rows()})
        if route == "/metrics":
            return Answer(200, self._sidecar.metrics().text(), "text/plain; version=0.0.4; charset=utf-8")
        told = f"no route {quoted(route)}; there are /healthz, /readyz, /v1/snapshots, /v1/residents, /metrics"
        return refusal(404, "not_found", told)

    def _order(self, request: Request, query: str) -> Answer:
        route = request.target.partition("?")[0]
        if not self._takes_orders or route != "/v1/snapshots":
            return refusal(405, "method_not_allowed", f"{quoted(route)} takes no POST here; pulls are asked for through {SOCKET}")
        try:
            self._sidecar.pulls.ask(json.loads(request.body)["uri"])
        except Busy as error:
            return refusal(503, "busy", str(error), Retry_After=str(error.retry_after_s))
        except (SettingsError, ValueError, KeyError, TypeError, RecursionError) as error:
            return refusal(400, "bad_request", f'the body must be {{"uri": "s3://bucket/prefix"}}: {described(error)}')
        return self._rows(query)

    def _rows(self, query: str) -> Answer:
        problem = {"error": self._sidecar.problem} if self._sidecar.problem else {}
        return document(200, {"snapshots": self._sidecar.pulls.rows(parse_qs(query).get("uri", [None])[0]), **problem})


def _bound(path: Path, kind: socket.SocketKind) -> socket.socket:
    """A listening unix socket. Raises WeightsError if another agent answers there."""
    with contextlib.closing(socket.socket(socket.AF_UNIX, kind)) as probe:
        probe.setblocking(False)  # one that is busy would have us wait for as long
        try:
            probe.connect(str(path))
        except FileNotFoundError:
            pass
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # of one that was killed
        except BlockingIOError:
            raise WeightsError(f"another agent is busy at {path}") from None
        except OSError as error:
            raise _no_socket(path, error) from error
        else:
            raise WeightsError(f"another agent is answering at {path}")
    found = socket.socket(socket.AF_UNIX, kind)
    try:
        found.bind(str(path))
        path.chmod(0o666)  # any user of a pod that mounts the directory may ask
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        raise _no_socket(path, error) from error
    return found


def _no_socket(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"cannot listen at {path}: {error}; such a path may have 107 bytes")


def _tcp(host: str, port: int) -> socket.socket:
    """A listening socket for an address of either family. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    is_both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=is_both)


class _Server:
    """The sockets of a sidecar or an agent, the loop that serves them, and the threads that answer what takes a look."""

    def __init__(self, settings: WeightsSettings, *, agent: bool) -> None:
        """Raises WeightsError or OSError."""
        free = raise_descriptor_limit()
        self.loop = Loop()
        # One of its own: a look at a descriptor that a function has given, or closing it, can take as long as that function likes.
        self._tier = Loop()
        self._paths: dict[Path, os.stat_result] = {}
        self._routes: list[Routes] = []
        self.sidecar = Sidecar(settings, pieces=min(resident.MAX_PIECES, max(8, free // 4)))
        self._threads = Threads(self.sidecar.failed)
        try:
            connections = min(CONNECTIONS, max(8, free // (4 if agent else 2)))
            self.loop.listen(_tcp(settings.host, settings.port), self._speak(takes_orders=False), connections)
            if agent:
                NodeCache(settings.cache_dir).create()
                self._listen_at(settings.cache_dir / SOCKET, socket.SOCK_STREAM, self.loop, self._speak(takes_orders=True), connections)
            if agent and settings.resident_bytes:
                meet = lambda sock: resident.FunctionPeer(sock, self.sidecar.residents)  # noqa: E731
                most = min(FUNCTIONS, max(8, free // 4))
                self._listen_at(settings.cache_dir / resident.SOCKET, socket.SOCK_SEQPACKET, self._tier, meet, most)
        except BaseException:
            self.close()
            raise

    def _speak(self, *, takes_orders: bool) -> Callable[[socket.socket], Peer]:
        """HTTP, each socket with a thread for its questions, so that those of one do not wait for those of another."""
        routes = Routes(self.sidecar, takes_orders=takes_orders)
        self._routes.append(routes)
        return lambda sock: HttpPeer(sock, routes)

    def _listen_at(self, path: Path, kind: socket.SocketKind, loop: Loop, meet: Callable[[socket.socket], Peer], most: int) -> None:
        loop.listen(_bound(path, kind), meet, most)
        self._paths[path] = path.stat()

    def lost(self) -> str | None:
        """What is wrong if somebody has taken a socket away, so that nobody can ask any more who does not know of it yet."""
        for path, bound in self._paths.items():
            try:
                if os.path.samestat(path.stat(), bound):
                    continue
            except OSError:
                pass
            return f"{path} has been taken away, and nobody can ask there any more"
        return None

    def run(self) -> None:
        """Serve until `loop.stop`."""
        for routes in self._routes:
            self._threads.start("answers", routes.serve)
        if any(path.name == resident.SOCKET for path in self._paths):
            self._threads.start("resident", self._tier.run)
        self.loop.run()

    def close(self) -> bool:
        """Stop listening, and end the answering; returns whether it has ended."""
        if not self.lost():  # else it may be another agent's by now
            for path in self._paths:
                path.unlink(missing_ok=True)
        self.loop.close()
        self._tier.stop()
        for routes in self._routes:
            routes.stop()
        is_over = self._threads.join(STOP_S / 2)
        if is_over:
            self._tier.close()
        return is_over


def _share_memory() -> None:
    """Have all threads allocate from the same memory: glibc gives each its own, and what one has used for a moment no other one gets."""
    with contextlib.suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 2)


def serve(settings: WeightsSettings, *, agent: bool = False) -> int:
    """Run the sidecar, or the agent, until SIGTERM or SIGINT; returns the exit status.

    Raises SettingsError, CacheError or OSError before it starts.
    """
    if not settings.uri and not agent:
        raise WeightsError("WEIGHTS_URI is not set: the sidecar needs to know which weights to keep present")
    if settings.uri:
        WeightsUri.parse(settings.uri)
    _share_memory()
    server = _Server(settings, agent=agent)
    with unhurried():
        is_over = _serve(server, settings, agent=agent)
    if not is_over:
        # Something is in the middle of a call to a store, or a disk, that stalls, and the interpreter would wait for it; what is in the
        # cache by now stays there for the next one.
        os._exit(0)
    server.sidecar.close()
    return 0


def _serve(server: _Server, settings: WeightsSettings, *, agent: bool) -> bool:
    """Until a signal; returns whether all threads have ended."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.loop.stop())
        if agent:
            server.sidecar.prepare()
        log.info(
            "keeping %s in %s; listening on %s:%d", settings.uri or "what is asked for", settings.cache_dir, settings.host, settings.port
        )
        server.sidecar.start(agent=agent, look=server.lost)
        server.run()
    finally:
        is_answered = server.close()
        is_over = server.sidecar.stop(STOP_S)
    return is_answered and is_over
