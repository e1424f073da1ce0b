"""GPUs, by torch's documented interface alone (torch.cuda: streams, events, pinned memory); ROCm's are `cuda` to torch, too.

Memory that other processes can have is not torch's: see `cuda_memory`.
"""

import functools
import logging
import mmap
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weights_cache.errors import WeightsError
from weights_cache.restore.device import Event, Shared

if TYPE_CHECKING:
    from weights_cache.restore.cuda_memory import CudaMemory

log = logging.getLogger("relight.weights")


class CudaDevice:
    """A GPU, with a stream of its own for copies.

    Whatever is done to it is done with it as torch's current device: else torch goes back to another one, and makes a context there.

    Staging buffers are pinned by torch's allocator, which keeps them for its next use; with `registered` they are memory of our own with
    large pages, pinned by cudaHostRegister and given back to the system at `close`. Which is better is for bench/gpu_restore.py to say.
    """

    def __init__(self, name: str, index: int | None = None, *, registered: bool = False) -> None:
        """Makes the context, which takes tenths of a second. Raises WeightsError if torch has no such GPU."""
        if not torch.cuda.is_available():
            built = "sees no GPU here" if torch.backends.cuda.is_built() else "is built without CUDA"  # type: ignore[no-untyped-call]
            raise WeightsError(f"device {name!r} cannot be used: this torch ({torch.__version__}) {built}")
        if index is not None and index >= torch.cuda.device_count():
            raise WeightsError(f"device {name!r} cannot be used: torch sees {torch.cuda.device_count()} GPUs, which count from cuda:0")
        self.name = name
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._owner = torch.cuda.current_stream(self._device)
        self._is_registering = registered
        self._registered: list[Tensor] = []

    def begin(self) -> None:
        """torch's allocator hands memory out by streams: it is given to the one that will use it."""
        self._owner = torch.cuda.current_stream(self._device)

    def free_bytes(self) -> int:
        """What the driver has, and what torch's allocator holds and does not use."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    def staging(self, size: int) -> Tensor:
        """Pinned: the copy engine reads it by itself, and the processor does not wait."""
        if not self._is_registering:
            with torch.cuda.device(self._device):  # else it might make a context on another one
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory
        with torch.cuda.device(self._device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))  # type: ignore[no-untyped-call]
        self._registered.append(buffer)
        return buffer

    def allocate(self, size: int) -> Tensor:
        """On the stream of whoever called `begin`; copies come after all that was done with this memory there."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._owner):
            try:
                found = torch.empty(size, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError as error:
                raise MemoryError(str(error)) from error
        self._stream.wait_stream(self._owner)
        return found

    def identity(self) -> str | None:
        """The GPU's UUID, or that of the part of it (MIG) that this process has."""
        return self._shareable.uuid if self._shareable else None

    def share(self, size: int) -> Shared:
        """Not from torch's allocator, which must give back what it holds and does not use if the driver has no more."""
        assert self._shareable is not None  # it has an identity
        try:
            return self._shareable.create(size)
        except MemoryError:
            torch.cuda.empty_cache()
            return self._shareable.create(size)

    def adopt(self, descriptor: int, size: int) -> Tensor:
        """Mapped to be read: a kernel that writes to it fails, and with it the process's context."""
        assert self._shareable is not None
        return self._shareable.adopt(descriptor, size)

    @functools.cached_property
    def _shareable(self) -> "CudaMemory | None":
        try:
            from weights_cache.restore.cuda_memory import CudaMemory

            return CudaMemory(self._device.index)
        except (ImportError, WeightsError) as error:
            log.warning("memory of %s cannot be shared: %s", self.name, error)
            return None

    def copy(self, target: Tensor, source: Tensor) -> Event:
        """On our own stream; from pinned memory `non_blocking` means that it returns at once."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            # Who waits for it sleeps: the cores are needed for the next buffers.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return _Copy(event, self._device)

    def synchronize(self) -> None:
        """All copies."""
        self._stream.synchronize()

    def close(self) -> None:
        """Pinned buffers go back to torch's allocator when nobody has them any more."""
        with torch.cuda.device(self._device):
            for buffer in self._registered:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))  # type: ignore[no-untyped-call]
        self._registered.clear()


class _Copy:
    """A CudaDevice's event."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        self._event.synchronize()

    def precede(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)
