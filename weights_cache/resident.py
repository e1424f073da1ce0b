"""The resident tier: weights that stay in a device's memory while no function uses them.

A function that has restored its weights hands the node's agent a descriptor of the memory they are in; the next function on that device
gets it and maps the same memory. Descriptors are all that the agent keeps: it has no device, no driver and no context. Memory is freed
when its last descriptor and its last mapping are gone, so that what is let go of here is free at once, unless a function uses it.

A connection to SOCKET takes messages of one JSON object, with a descriptor beside it where there is one:

    {"do": "keep", "key": …, "device": …, "bytes": …, "uri": …} + descriptor   →  {"kept": true | false}
    {"do": "attach", "key": …, "device": …}                                    →  {"bytes": …} + descriptor, or {}
    {"do": "make_room", "device": …, "bytes": …}                               →  {"freed": …}
    {"do": "drop", "key": …, "device": …}                                      →  {}

It is a lease on all that it kept or attached: the kernel ends it with the process. Whoever can connect can have every descriptor.
"""

import contextlib
import json
import logging
import os
import socket
import socketserver
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("relight.weights")

SOCKET = "resident.sock"
MAX_MESSAGE_BYTES = 64 * 1024


@dataclass
class _Resident:
    """What stays, in one allocation of a device."""

    bytes: int
    uri: str  # for people
    descriptor: int
    leases: set[object]
    used: float = field(default_factory=time.monotonic)  # when the last lease ended


class Residents:
    """What stays on the node's devices: bounded for each, and let go of in the order of last use, never while it is leased.

    A lease is held by any object, and ends by `release`.
    """

    def __init__(self, limit_bytes: int) -> None:
        """limit_bytes: for each device."""
        self._limit = limit_bytes
        self._lock = threading.Lock()  # guards what follows
        self._table: dict[tuple[str, str], _Resident] = {}  # by device and key
        self.counts = Counter(dict.fromkeys(("kept", "refused", "attached", "missed", "evicted"), 0))

    def keep(self, key: str, device: str, size: int, uri: str, descriptor: int, holder: object) -> bool:
        """Keep a copy of the descriptor, if there is room or can be made; returns whether it is kept."""
        with self._lock:
            is_kept = (device, key) not in self._table and self._fit(device, size)
            self.counts["kept" if is_kept else "refused"] += 1
            if is_kept:
                self._table[device, key] = _Resident(size, uri, os.dup(descriptor), {holder})
            return is_kept

    def attach(self, key: str, device: str, holder: object) -> tuple[int, int] | None:
        """A descriptor, which is the caller's to close, and the bytes it is of, with a lease; None if there is no such memory."""
        with self._lock:
            found = self._table.get((device, key))
            self.counts["attached" if found else "missed"] += 1
            if not found:
                return None
            found.leases.add(holder)
            return os.dup(found.descriptor), found.bytes

    def make_room(self, device: str, size: int) -> int:
        """Let go of `size` bytes of a device, or of all that nobody uses there; returns how many it were."""
        with self._lock:
            return self._evict(device, size)

    def drop(self, key: str, device: str) -> None:
        """Let go of what turned out to be of no use."""
        with self._lock:
            if (device, key) in self._table:
                self._let_go(device, key)

    def release(self, holder: object) -> None:
        """End the leases of `holder`."""
        with self._lock:
            for resident in self._table.values():
                if holder in resident.leases:
                    resident.leases.discard(holder)
                    resident.used = time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        """What stays where, the most lately used first."""
        now = time.monotonic()
        with self._lock:
            found = sorted(self._table.items(), key=lambda item: (not item[1].leases, -item[1].used))
            return [
                {
                    "device": device,
                    "uri": one.uri,
                    "bytes": one.bytes,
                    "leases": len(one.leases),
                    "idle_s": 0.0 if one.leases else round(now - one.used, 1),
                }
                for (device, _), one in found
            ]

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            for device, key in list(self._table):
                self._let_go(device, key)

    def _fit(self, device: str, size: int) -> bool:
        """Make room for `size` bytes within the limit; nothing is let go of in vain."""
        there = [one for (where, _), one in self._table.items() if where == device]
        excess = sum(one.bytes for one in there) + size - self._limit
        if excess > sum(one.bytes for one in there if not one.leases):
            return False
        if excess > 0:
            self._evict(device, excess)
        return True

    def _evict(self, device: str, size: int) -> int:
        idle = [(one.used, key, one.bytes) for (where, key), one in self._table.items() if where == device and not one.leases]
        freed = 0
        for _, key, found in sorted(idle):
            if freed >= size:
                break
            self._let_go(device, key)
            self.counts["evicted"] += 1
            freed += found
        return freed

    def _let_go(self, device: str, key: str) -> None:
        os.close(self._table.pop((device, key)).descriptor)


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Where functions ask: a thread for each, which lives as long as the function. Its handlers' class has the `residents`."""

    socket_type = socket.SOCK_SEQPACKET  # a message is a whole one, and its descriptor comes with it
    daemon_threads = True


class Handler(socketserver.BaseRequestHandler):
    """One function. A subclass has the `residents` that it asks."""

    residents: Residents
    request: socket.socket

    def handle(self) -> None:
        """Answer until it goes, or says what nobody understands."""
        try:
            while self._serve():
                pass
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            with contextlib.suppress(OSError):
                self._send({"error": f"no such message: {error!r}"})
        except OSError:
            pass  # it has gone
        finally:
            self.residents.release(self)

    def _serve(self) -> bool:
        """Answer one message; False if there will be none."""
        data, descriptors, flags, _ = socket.recv_fds(self.request, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError(f"at most {MAX_MESSAGE_BYTES} bytes and one descriptor")
            if data:
                self._answer(json.loads(data), descriptors)
            return bool(data)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, message: dict[str, Any], descriptors: list[int]) -> None:
        what, device = message["do"], _text(message["device"])
        if (what == "keep") != bool(descriptors):
            raise ValueError("a descriptor comes with keep, and with keep alone")
        if what == "keep":
            self._send({"kept": self._keep(_text(message["key"]), device, _size(message["bytes"]), _text(message["uri"]), *descriptors)})
        elif what == "attach":
            self._attach(_text(message["key"]), device)
        elif what == "make_room":
            self._send({"freed": self.residents.make_room(device, _size(message["bytes"]))})
        elif what == "drop":
            self.residents.drop(_text(message["key"]), device)
            self._send({})
        else:
            raise ValueError(what)

    def _keep(self, key: str, device: str, size: int, uri: str, descriptor: int) -> bool:
        is_kept = self.residents.keep(key, device, size, uri, descriptor, self)
        log.info("%s: %.1f MB %s in the memory of %s", uri, size / 1e6, "stay" if is_kept else "do not stay", device)
        return is_kept

    def _attach(self, key: str, device: str) -> None:
        if not (found := self.residents.attach(key, device, self)):
            self._send({})
            return
        descriptor, size = found
        try:
            self._send({"bytes": size}, descriptor)
        finally:
            os.close(descriptor)

    def _send(self, answer: dict[str, Any], *descriptors: int) -> None:
        socket.send_fds(self.request, [json.dumps(answer).encode()], descriptors)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(value)
    return value
