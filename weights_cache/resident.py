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

import fcntl
import json
import logging
import os
import re
import socket
import stat
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from weights_cache.excerpt import described, told
from weights_cache.loop import Peer

log = logging.getLogger("relight.weights")

SOCKET = "resident.sock"
MAX_MESSAGE_BYTES = 64 * 1024
MAX_PIECES = 256  # on all devices together: each holds a descriptor
PIECE_BYTES = 2 << 20  # a device gives no less, and so none counts for less

_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
_HOST = re.compile(r"host(?::\d+)?")
_GPU = re.compile(r"GPU-[0-9a-f-]{1,64}")
_KEY = re.compile(r"[!-~]{1,128}")
_MAX_URI_SIGNS = 1200


@dataclass
class _Resident:
    """What stays, in one allocation of a device."""

    said: int  # bytes, by who left it
    bytes: int  # that it counts for
    uri: str  # for people
    descriptor: int
    leases: set[object]
    used: float = field(default_factory=time.monotonic)  # when the last lease ended


class Residents:
    """What stays on the node's devices: bounded for each, and let go of in the order of last use, never while it is leased.

    A lease is held by any object, and ends by `release`.
    """

    def __init__(self, limit_bytes: int, pieces: int = MAX_PIECES) -> None:
        """limit_bytes: for each device. pieces: the most allocations, on all of them."""
        self._limit = limit_bytes
        self._pieces = pieces
        self._lock = threading.Lock()  # guards what follows
        self._table: dict[tuple[str, str], _Resident] = {}  # by device and key
        self.counts = Counter(dict.fromkeys(("kept", "refused", "attached", "missed", "evicted"), 0))

    def keep(self, key: str, device: str, size: int, uri: str, descriptor: int, holder: object) -> bool:
        """Keep a copy of the descriptor, if there is room or can be made; returns whether it is kept.

        size: what it is said to be of; it counts for what it can be seen to hold. Raises ValueError if that is something else.
        """
        held = _held_bytes(descriptor, device, size)
        with self._lock:
            is_kept = (device, key) not in self._table and self._fit(device, held)
            self.counts["kept" if is_kept else "refused"] += 1
            if is_kept:
                self._table[device, key] = _Resident(size, held, uri, os.dup(descriptor), {holder})
            return is_kept

    def attach(self, key: str, device: str, holder: object) -> tuple[int, int] | None:
        """A descriptor, which is the caller's to close, and the bytes it is of, with a lease; None if there is no such memory."""
        with self._lock:
            found = self._table.get((device, key))
            self.counts["attached" if found else "missed"] += 1
            if not found:
                return None
            found.leases.add(holder)
            return os.dup(found.descriptor), found.said

    def make_room(self, device: str, size: int) -> int:
        """Let go of `size` bytes of a device, or of all that nobody uses there; returns how many it were."""
        with self._lock:
            return self._evict(device, size)

    def drop(self, key: str, device: str) -> None:
        """Let go of what turned out to be of no use."""
        with self._lock:
            if (device, key) in self._table:
                self._let_go((device, key))

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
                self._let_go((device, key))

    def _fit(self, device: str, size: int) -> bool:
        """Make room for `size` bytes within the limits; nothing is let go of in vain."""
        there = [one for (where, _), one in self._table.items() if _memory(where) == _memory(device)]
        excess = sum(one.bytes for one in there) + size - self._limit
        if excess > sum(one.bytes for one in there if not one.leases):
            return False
        if len(self._table) >= self._pieces and all(one.leases for one in self._table.values()):
            return False
        if excess > 0:
            self._evict(device, excess)
        if len(self._table) >= self._pieces:
            self._evict_oldest()
        return True

    def _evict(self, device: str, size: int) -> int:
        idle = [
            (one.used, place, one.bytes) for place, one in self._table.items() if _memory(place[0]) == _memory(device) and not one.leases
        ]
        freed = 0
        for _, place, found in sorted(idle):
            if freed >= size:
                break
            self._let_go(place)
            self.counts["evicted"] += 1
            freed += found
        return freed

    def _evict_oldest(self) -> None:
        self._let_go(min((one.used, place) for place, one in self._table.items() if not one.leases)[1])
        self.counts["evicted"] += 1

    def _let_go(self, place: tuple[str, str]) -> None:
        os.close(self._table.pop(place).descriptor)


def _memory(device: str) -> str:
    """What a device has its memory from: those of the host share it."""
    return "host" if _HOST.fullmatch(device) else device


def _held_bytes(descriptor: int, device: str, said: int) -> int:
    """What a descriptor holds of a device's memory.

    Host memory can be looked at: it has to be a file in memory (memfd) that can neither grow nor shrink any more. A GPU's can be looked at
    by its driver alone, which an agent has not: there it is what is said, and at least one allocation. Raises ValueError for anything else.
    """
    found = os.fstat(descriptor)
    if _HOST.fullmatch(device):
        if not stat.S_ISREG(found.st_mode) or not _is_sealed(descriptor):
            raise ValueError("memory of the host comes as a memfd that is sealed against growing and shrinking")
        if found.st_size != said:
            raise ValueError(f"the descriptor is of {found.st_size} bytes, {said} were said")
        return said
    if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or stat.S_ISSOCK(found.st_mode) or stat.S_ISFIFO(found.st_mode):
        raise ValueError("the descriptor is not of a device's memory")
    return -(-said // PIECE_BYTES) * PIECE_BYTES


def _is_sealed(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False  # a file on a disk has no seals


class FunctionPeer(Peer):
    """A function that asks. It stays for as long as the function likes; one that holds leases never gives way to another."""

    def __init__(self, sock: socket.socket, residents: Residents) -> None:
        super().__init__(sock)
        self._residents = residents
        self._holds = False  # leases, perhaps

    def ready(self) -> None:
        """Answer one message; whoever says what nobody understands, or does not read, is told so and goes."""
        try:
            if not self._serve():
                self.close()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._send({"error": f"no such message: {told(repr(error), 300)}"})
            self.close()

    def rank(self) -> int | None:
        """The leases of a function that runs are worth more than another function's."""
        return None if self._holds else 0

    def close(self) -> None:
        """It has gone, and its leases with it."""
        self._residents.release(self)
        super().close()

    def _serve(self) -> bool:
        """Answer one message; False if there will be none."""
        try:
            data, descriptors, flags, _ = socket.recv_fds(self.sock, MAX_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise ValueError(f"at most {MAX_MESSAGE_BYTES} bytes and one descriptor")
            if data:
                self._answer(json.loads(data), descriptors)
                self.since = time.monotonic()
            return bool(data)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, message: dict[str, Any], descriptors: list[int]) -> None:
        what, device = message["do"], _device(message["device"])
        if (what == "keep") != bool(descriptors):
            raise ValueError("a descriptor comes with keep, and with keep alone")
        if what == "keep":
            self._send({"kept": self._keep(_key(message["key"]), device, _size(message["bytes"]), _uri(message["uri"]), *descriptors)})
        elif what == "attach":
            self._attach(_key(message["key"]), device)
        elif what == "make_room":
            self._send({"freed": self._residents.make_room(device, _size(message["bytes"]))})
        elif what == "drop":
            self._residents.drop(_key(message["key"]), device)
            self._send({})
        else:
            raise ValueError(what)

    def _keep(self, key: str, device: str, size: int, uri: str, descriptor: int) -> bool:
        try:
            is_kept = self._residents.keep(key, device, size, uri, descriptor, self)
        except OSError as error:  # no descriptor is left
            log.warning("%s does not stay: %s", uri, described(error))
            return False
        self._holds = self._holds or is_kept
        log.info("%s: %.1f MB %s in the memory of %s", uri, size / 1e6, "stay" if is_kept else "do not stay", device)
        return is_kept

    def _attach(self, key: str, device: str) -> None:
        if not (found := self._residents.attach(key, device, self)):
            self._send({})
            return
        self._holds = True
        descriptor, size = found
        try:
            self._send({"bytes": size}, descriptor)
        finally:
            os.close(descriptor)

    def _send(self, answer: dict[str, Any], *descriptors: int) -> None:
        """Raises OSError, also if it has no room for an answer because it reads none."""
        socket.send_fds(self.sock, [json.dumps(answer).encode()], descriptors)


def _matching(value: object, form: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(value)
    return value


def _device(value: object) -> str:
    return _matching(value, _GPU if isinstance(value, str) and value.startswith("GPU-") else _HOST)


def _key(value: object) -> str:
    return _matching(value, _KEY)


def _uri(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return told(value, _MAX_URI_SIGNS)


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 63:
        raise ValueError(value)
    return value
