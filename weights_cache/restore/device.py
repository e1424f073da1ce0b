"""A device: memory for tensors, and copies into it that go on by themselves.

`cuda` is the one that matters. `host` is ordinary memory behind the same interface, with a thread in the place of the copy engine, so that
everything but the copy itself runs, and is tested, without a GPU.
"""

import ctypes
import re
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weights_cache.errors import WeightsError

CPU = "cpu"  # no device of these: tensors there are views of the file
_KIND = re.compile(r"(cuda|host)(?::(\d+))?")


class Event(Protocol):
    """A copy that was begun, and all that were begun before it on its device."""

    def wait(self) -> None:
        """Return once they are done."""

    def precede(self) -> None:
        """What the calling thread computes on the device from now on, on its current stream, happens after them."""


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
        self._stream = ThreadPoolExecutor(1, thread_name_prefix=f"copies to {name}")  # one thread: copies are done in their order

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

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """In the thread."""
        return _Copy(self._stream.submit(_move, target, source))

    def synchronize(self) -> None:
        """Whatever was submitted before is done when this is."""
        self._stream.submit(_nothing).result()

    def close(self) -> None:
        """End the thread."""
        self._stream.shutdown()


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
