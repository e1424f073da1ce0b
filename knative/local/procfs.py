"""Processes as the kernel lists them: whose they are, what memory is theirs alone, where others can reach them, and the end of those that
a container left behind.
"""

import contextlib
import ipaddress
import os
import select
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# In the environment of every process of a container, and so of all that it starts, in whatever session and under whatever parent.
# Its value ends in a slash: `<state directory's identity>/<namespace>/<pod>/<container>/`.
MARK = "RELIGHT_CONTAINER"
END_S = 5.0  # for killed processes to be gone

_PAGE = os.sysconf("SC_PAGESIZE")
_PROC = Path("/proc")
_LISTENS = b"0A"  # in /proc/net/tcp


class Kin(NamedTuple):
    """How a process belongs to others."""

    parent: int
    session: int


def kin() -> dict[int, Kin]:
    """All processes of this machine."""
    found = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            found[pid] = Kin(int(fields[1]), int(fields[3]))
    return found


def members(root: int, among: dict[int, Kin]) -> set[int]:
    """A session's processes, and all that descend from them: `root` leads the session."""
    children = defaultdict(list)
    for pid, (parent, _) in among.items():
        children[parent].append(pid)
    found: set[int] = set()
    new = [pid for pid, (_, session) in among.items() if session == root]
    while new:
        pid = new.pop()
        if pid not in found:
            found.add(pid)
            new += children[pid]
    return found


def own_bytes(pids: Iterable[int], limit: float) -> int:
    """Memory that is theirs: anonymous pages, those shared by several counted in parts (PSS).

    Not counted is what the kernel can take back or has once for all: mapped files such as weights, and shared memory. The exact figure
    takes a walk through every page, so below `limit` it is a quick one, in which shared pages count in full.
    """
    quick = sum(_resident_alone(pid) for pid in pids)
    return quick if quick <= limit else sum(_proportional(pid) for pid in pids)


def exposed(pids: Iterable[int]) -> list[str]:
    """Where these processes can be reached from other machines, as `address:port` of each TCP socket that listens beyond loopback."""
    found: set[tuple[str, int]] = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if sockets := _sockets(pid):
                found |= {place for inode, place in _listening(pid) if inode in sockets}
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in sorted(found)]


def _sockets(pid: int) -> set[int]:
    """The sockets that it has open, by inode."""
    found = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            link = os.readlink(entry.path)  # noqa: PTH115  hundreds at a time
            if link.startswith("socket:["):
                found.add(int(link[8:-1]))
    return found


def _listening(pid: int) -> Iterator[tuple[int, tuple[str, int]]]:
    """The TCP sockets of its network that listen beyond loopback: inode, address and port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            for line in _read(f"/proc/{pid}/net/{table}").splitlines()[1:]:
                fields = line.split()
                host, _, port = fields[1].decode().partition(":")
                address = _address(host)
                if fields[3] == _LISTENS and not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
                    yield int(fields[9]), (str(address), int(port, 16))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """As the kernel prints them: words of four bytes, each in the machine's own order."""
    words = (int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))
    return ipaddress.ip_address(b"".join(words))


def end_marked(prefix: str) -> int:
    """Kill every process whose mark begins with this, and wait until they are gone; returns how many there were.

    A process is known by its environment, and signalled by a descriptor that was opened before that was read: a number that is somebody
    else's by now is never hit. A process of another user is not seen.
    """
    ended, until = 0, time.monotonic() + END_S
    while found := list(_marked(prefix)):  # again, for those that were started meanwhile
        for fd in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        for fd in found:
            if select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
                ended += 1
            os.close(fd)
        if time.monotonic() >= until:
            break
    return ended


def _marked(prefix: str) -> Iterator[int]:
    """A descriptor of each."""
    sought = f"{MARK}={prefix}".encode()
    for pid in _pids():
        if pid == os.getpid():
            continue
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue
        if _has(pid, sought):
            yield fd
        else:
            os.close(fd)


def marked(prefix: str) -> list[int]:
    """Every process whose mark begins with this; a number may be somebody else's by the time it is used."""
    sought = f"{MARK}={prefix}".encode()
    return [pid for pid in _pids() if _has(pid, sought)]


def _has(pid: int, sought: bytes) -> bool:
    """Whether a variable of its environment begins so."""
    try:
        return any(entry.startswith(sought) for entry in _read(f"/proc/{pid}/environ").split(b"\0"))
    except OSError:
        return False


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(_PROC) if name.isdigit())  # noqa: PTH208  names alone, which a Path each is not


def _read(path: str) -> bytes:
    """The whole file; by system calls alone, as hundreds are read at a time."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 65536):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def _resident_alone(pid: int) -> int:
    try:
        _, resident, shared, *_ = _read(f"/proc/{pid}/statm").split()
    except OSError:
        return 0
    return (int(resident) - int(shared)) * _PAGE


def _proportional(pid: int) -> int:
    try:
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss_Anon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return _resident_alone(pid)  # a kernel before 5.4
