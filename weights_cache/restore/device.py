"""A device: memory for tensors, and copies into it that go on by themselves.

`cuda` is the one that matters. `host` is ordinary memory behind the same interface, with a thread in the place of the copy engine, so that
everything but the copy itself runs, and is tested, without a GPU.
"""

import ctypes
import fcntl
import mmap
import os
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weights_cache.errors import WeightsError
from weights_cache.threads import in_order

CPU = "cpu"  # no device of these: tensors there are views of the file
_KIND = re.compile(r"(cuda|host)(?::(\d+))?")


class Event(Protocol):
    """A copy that was begun, and all that were begun before it on its device."""

    def wait(self) -> None:
        """Return once they are done."""

    def precede(self) -> None:
        """What the calling thread computes on the device from now on, on its current stream, happens after them."""


class Shared(Protocol):
    """Memory of a device that other processes can have, too."""

    tensor: Tensor  # all of it, uint8

    def seal(self) -> None:
        """Nobody changes it from now on: what writes to it in place fails, or reaches nobody else. Raises WeightsError or OSError."""

    def descriptor(self) -> int:
        """A file descriptor that keeps the memory, for `adopt`; the caller's to close. Raises WeightsError, MemoryError or OSError."""

    def close(self) -> None:
        """No more descriptors are wanted. The memory lives as long as tensors of it, or descriptors, do."""


class Device(Protocol):
    """Memory for tensors. Its methods but `begin` may be called from any thread."""

    name: str

    def begin(self) -> None:
        """Called by the thread that the tensors are for: what is allocated from now on belongs to its current stream."""

    def free_bytes(self) -> int:
        """How much could be allocated."""

    def staging(self, size: int) -> Tensor:
        """A buffer of so many bytes in the host's memory, from which copies are fast. It may be used until `close`."""

    def allocate(self, size: int) -> Tensor:
        """So many bytes of the device, uint8. Raises MemoryError."""

    def identity(self) -> str | None:
        """What every process on this node calls it; None if its memory cannot be shared."""

    def share(self, size: int) -> Shared:
        """As `allocate`, memory that can be shared. Raises MemoryError."""

    def adopt(self, descriptor: int, size: int) -> Tensor:
        """What another process has sealed there, to be read. Raises WeightsError, MemoryError or OSError."""

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """Begin to copy bytes of a staging buffer, which must stay as they are until the event, to the device."""

    def synchronize(self) -> None:
        """Return once all copies are done."""

    def close(self) -> None:
        """Give the staging buffers back; all copies are done."""


def open_device(name: str) -> Device:
    """The device of that name (cuda, cuda:1, host), with all that is slow about it done. Raises WeightsError if there is none."""
    found = _KIND.fullmatch(name)
    if not found:
        raise WeightsError(f"weights cannot be restored to device {name!r}; it must be cpu, cuda, cuda:<number> or host")
    if found[1] == "host":
        return HostDevice(name)
    from weights_cache.restore.cuda import CudaDevice

    return CudaDevice(name, None if found[2] is None else int(found[2]))


def torch_device(name: str) -> torch.device:
    """What torch calls it."""
    return torch.device(name if name.startswith("cuda") else CPU)


class HostDevice:
    """Ordinary memory of this process."""

    def __init__(self, name: str = "host") -> None:
        self.name = name
        self._stream = in_order(f"copies to {name}")

    def begin(self) -> None:
        """There are no streams."""

    def free_bytes(self) -> int:
        """What the kernel says could be had without swapping."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

    def staging(self, size: int) -> Tensor:
        """Touched, as pinned memory would be."""
        return torch.zeros(size, dtype=torch.uint8)

    def allocate(self, size: int) -> Tensor:
        """Pages come as they are written to."""
        try:
            return torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def identity(self) -> str | None:
        """Its name: any process can have this memory."""
        return self.name

    def share(self, size: int) -> Shared:
        """A file that is nowhere but in memory."""
        return _HostShared(size)

    def adopt(self, descriptor: int, size: int) -> Tensor:
        """Copy-on-write, as the tensors of a file on the CPU are."""
        if (there := os.fstat(descriptor).st_size) < size:  # reading beyond it would be a SIGBUS
            raise WeightsError(f"there are {there} bytes where {size} are wanted")
        return _mapped(descriptor, size, mmap.MAP_PRIVATE)

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """In the thread."""
        return _Copy(self._stream.submit(_move, target, source))

    def synchronize(self) -> None:
        """Whatever was submitted before is done when this is."""
        self._stream.submit(_nothing).result()

    def close(self) -> None:
        """End the thread."""
        self._stream.shutdown()


class _HostShared:
    """A memfd, mapped."""

    def __init__(self, size: int) -> None:
        """Takes all pages now: later, none would be a SIGBUS. Raises MemoryError."""
        self._descriptor = os.memfd_create("relight-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self._descriptor, 0, size)
            # Whoever keeps it counts on what it takes; whoever maps it, on its being there.
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            self.tensor = _mapped(self._descriptor, size, mmap.MAP_SHARED)
        except OSError as error:
            self.close()
            raise MemoryError(str(error)) from error

    def seal(self) -> None:
        """Mapped anew in the same place, copy-on-write."""
        address = self.tensor.data_ptr()
        how = mmap.MAP_PRIVATE | _MAP_FIXED
        found = _MMAP(address, self.tensor.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, how, self._descriptor, 0)
        if found != address:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def descriptor(self) -> int:
        return os.dup(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


_MAP_FIXED = 0x10  # which Python's mmap has no name for, as it has none for an address
_MMAP = ctypes.CDLL(None, use_errno=True).mmap
_MMAP.restype = ctypes.c_size_t
_MMAP.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def _mapped(descriptor: int, size: int, how: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size, flags=how), dtype=torch.uint8)  # which keeps the mapping


class _Copy:
    """A HostDevice's event."""

    def __init__(self, done: "Future[None]") -> None:
        self._done = done

    def wait(self) -> None:
        self._done.result()

    def precede(self) -> None:
        self._done.result()  # there is no stream to do the waiting


def _move(target: Tensor, source: Tensor) -> None:
    ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())


def _nothing() -> None:
    pass
