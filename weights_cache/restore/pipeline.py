"""Files into devices' memory, as their bytes land on the node.

    file ──copier threads──▶ staging buffers ──the device's copy engine──▶ one allocation a file, tensors as views of it

A device has a ring of staging buffers (`Ring`), and each copier thread two of them: it fills one while the other is on its way. Blocks
are taken in file order, so that the copying follows the fetching, chunk by chunk. One thread plans: it reads each file's header as soon
as it is there, allocates, and cuts. All devices are filled at the same time. What an earlier function left on the device (`tier`) is
attached instead, and what was restored is left there in the end.
"""

import ctypes
import os
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weights_cache.chunks import CHUNK_BYTES
from weights_cache.errors import WeightsError
from weights_cache.restore.device import CPU, Device, Event, Shared, open_device
from weights_cache.restore.layout import Part, Placed, cut, lay_out
from weights_cache.restore.placement import Placement
from weights_cache.restore.tensors import cast_type, check_cast, elements, view
from weights_cache.restore.tier import Tier, key
from weights_cache.safetensors_header import TensorInfo
from weights_cache.threads import Threads

SLOT_BYTES = 8 << 20  # of a staging buffer
COPIERS = 6  # for each device: a core copies about 10 GB/s, a bus takes 25 to 60
SLOTS = 2  # for each copier


class Source(Protocol):
    """A file that may still be filled."""

    path: str
    version: str  # names its content
    size: int
    view: memoryview  # of all of it

    def header(self, pause: Callable[[], None]) -> Sequence[TensorInfo]:
        """Its tensors in file order; calls `pause` for as long as the header is not there. Raises WeightsError."""

    def has(self, start: int, stop: int) -> bool:
        """Whether those bytes are there. Raises WeightsError if what was read before is damaged."""

    def pause(self) -> None:
        """Between two looks. Raises WeightsError if there is nothing more to wait for."""


class Ring:
    """A device and the staging buffers on the way to it, of one restore at a time."""

    def __init__(self, device: Device, *, copiers: int = 0, slot_bytes: int = SLOT_BYTES) -> None:
        """copiers: threads, 0 for as many as there are cores and COPIERS at most. slot_bytes: a multiple of 256."""
        self.device = device
        self.copiers = copiers or min(COPIERS, len(os.sched_getaffinity(0)))
        self.slot_bytes = slot_bytes
        self.slots = [device.staging(slot_bytes) for _ in range(SLOTS * self.copiers)]

    @classmethod
    def open(cls, device: str) -> "Ring":
        """One for the device of that name. Raises WeightsError."""
        return cls(open_device(device))

    def close(self) -> None:
        """Give the buffers back."""
        self.device.close()
        self.slots.clear()


class _Block(NamedTuple):
    """A piece of an allocation, and what goes into it."""

    number: int  # of its lane, in file order
    target: Tensor
    start: int  # in the allocation
    parts: Sequence[Part]
    source: Source


class _Lane:
    """What is on its way to one device; guarded by the restore's condition."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.count = 0  # blocks so far
        self.waiting: deque[_Block] = deque()
        self.events: dict[int, Event] = {}  # by block: copies that were begun and that the caller does not know of
        self.known = 0  # blocks that the caller's stream comes after


class _Planned(NamedTuple):
    """A tensor to hand out, once so many blocks of its lane have landed; without a lane it is a view of its file."""

    info: TensorInfo
    source: Source
    tensor: Tensor | None
    lane: _Lane | None
    blocks: int


class _Over(Exception):
    """The restore ends; nobody is told."""


class Restore:
    """One restore. `tensors` does everything; it is to be exhausted or closed."""

    def __init__(
        self,
        sources: Sequence[Source],
        placement: Placement,
        rings: Mapping[str, Ring],
        dtype: torch.dtype | None = None,
        tier: Tier | None = None,
    ) -> None:
        """rings: by the placement's devices, but `cpu`. dtype: see `tensors.cast_type`. Raises WeightsError."""
        check_cast(dtype)
        self.attached_bytes = self.copied_bytes = 0  # on devices
        self._sources = sources
        self._placement = placement
        self._dtype = dtype
        self._tier = tier
        self._lanes = {name: _Lane(ring) for name, ring in rings.items()}
        self._layouts: dict[str, dict[str, tuple[list[Placed], int]]] = {}  # by file and device, until they are needed
        self._attached: dict[tuple[str, str], Tensor | None] = {}  # likewise: what was asked for, and is there
        self._shared: list[tuple[Tier, str, Device, Shared]] = []  # to be left, where and by which key
        self._changed = threading.Condition()  # guards what follows, and the lanes
        self._planned: deque[_Planned] = deque()
        self._is_planned = False
        self._error: BaseException | None = None
        self._is_over = False
        self._threads = Threads(self._failed)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by name, in file order, as it lands.

        It may be used at once by whatever the calling thread then does on its current stream; once the iterator has ended, by everybody.
        Tensors of one file share an allocation, which is given back when none of them is left. If it is closed early, or raises, all
        that was allocated is given back but for what the caller holds. Raises WeightsError.
        """
        planned: _Planned | None = None
        try:
            self._start()
            while planned := self._next():
                yield planned.info.name, self._hand_out(planned)
                planned = None  # the caller decides how long it lives
            for lane in self._lanes.values():
                lane.ring.device.synchronize()
            for source in self._sources:
                source.has(0, source.size)  # raises if it was found to be damaged meanwhile
            for tier, left, device, shared in self._shared:
                tier.keep(left, device, shared)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error does not keep the memory
            raise
        finally:
            planned = None
            self._stop()

    def _start(self) -> None:
        for lane in self._lanes.values():
            lane.ring.device.begin()
            for copier in range(lane.ring.copiers):
                slots = lane.ring.slots[copier * SLOTS : (copier + 1) * SLOTS]
                self._threads.start(f"restore to {lane.ring.device.name}", self._copy, lane, slots)
        self._threads.start("restore", self._plan)

    def _failed(self, name: str, error: BaseException) -> None:
        """In a thread that ended by an exception; it is raised where the tensors are asked for."""
        if isinstance(error, _Over):
            return
        traceback.clear_frames(error.__traceback__)
        with self._changed:
            self._error = self._error or error
            self._is_over = True
            self._changed.notify_all()

    def _stop(self) -> None:
        """End the threads and let go of everything."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        try:
            self._threads.join()  # but for this one, which may be collecting garbage, and us with it
        finally:
            for lane in self._lanes.values():
                lane.ring.device.synchronize()  # nothing writes any more to memory that somebody else may get now
                lane.waiting.clear()
                lane.events.clear()
            self._planned.clear()
            self._attached.clear()
            for *_, shared in self._shared:
                shared.close()
            self._shared.clear()
            self._error = None  # which knows us

    # In the caller's thread

    def _next(self) -> _Planned | None:
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._planned or self._is_planned)
            if self._error:
                raise self._error
            return self._planned.popleft() if self._planned else None

    def _hand_out(self, planned: _Planned) -> Tensor:
        lane = planned.lane
        if lane is None:
            return self._view(planned)
        while lane.known < planned.blocks:
            with self._changed:
                self._changed.wait_for(lambda: self._error or lane.known in lane.events)
                if self._error:
                    raise self._error
                event = lane.events.pop(lane.known)
            event.precede()
            lane.known += 1
        assert planned.tensor is not None
        return planned.tensor

    def _view(self, planned: _Planned) -> Tensor:
        self._wait(planned.source, planned.info.start, planned.info.stop)
        found = view(planned.source.view, planned.info)
        return found.to(cast_type(found.dtype, self._dtype))

    # In the planner's thread

    def _plan(self) -> None:
        for number, source in enumerate(self._sources):
            if self._is_over:
                return
            header = source.header(lambda source=source: self._pause(source))  # type: ignore[misc]
            self._lay_out(source, header)
            self._check_room(source, self._sources[number + 1 :] if number == 0 else ())
            planned: dict[str, _Planned] = {}
            for name, (placed, size) in self._lay_out(source, header).items():
                lane = self._lanes[name]
                first = lane.count
                blocks: list[list[Part]] = []
                self._attach(source, name)
                if (memory := self._attached.pop((source.path, name))) is not None:
                    self.attached_bytes += size
                else:
                    memory = self._allocate(source, name)
                    blocks = cut(placed, size, lane.ring.slot_bytes)
                    self.copied_bytes += size
                for tensor in placed:
                    end = first + -(-(tensor.at + tensor.size) // lane.ring.slot_bytes) if blocks and tensor.size else first
                    planned[tensor.info.name] = _Planned(tensor.info, source, tensor.of(memory), lane, end)
                with self._changed:
                    for at, parts in enumerate(blocks):
                        start = at * lane.ring.slot_bytes
                        lane.waiting.append(_Block(first + at, memory[start : start + lane.ring.slot_bytes], start, parts, source))
                    lane.count += len(blocks)
                    self._changed.notify_all()
            with self._changed:
                self._planned.extend(planned.get(info.name) or _Planned(info, source, None, None, 0) for info in header)
                self._changed.notify_all()
        with self._changed:
            self._is_planned = True
            self._changed.notify_all()

    def _lay_out(self, source: Source, header: Sequence[TensorInfo]) -> dict[str, tuple[list[Placed], int]]:
        """By device, where the tensors of a file go; those on the CPU stay where they are."""
        if source.path not in self._layouts:
            groups: dict[str, list[TensorInfo]] = {}
            for info in header:
                device = self._placement(info.name)
                if device != CPU:
                    groups.setdefault(device, []).append(info)
            self._layouts[source.path] = {name: lay_out(infos, self._dtype) for name, infos in groups.items()}
        return self._layouts[source.path]

    def _attach(self, source: Source, name: str) -> Tensor | None:
        """What an earlier function left on that device of this file, which has been laid out."""
        place = (source.path, name)
        if place not in self._attached:
            placed, size = self._layouts[source.path][name]
            device = self._lanes[name].ring.device
            tier = self._tier_for(device)
            self._attached[place] = tier.attach(key(source.version, placed), device, size) if tier and size else None
        return self._attached[place]

    def _check_room(self, first: Source, later: Sequence[Source]) -> None:
        """Raises WeightsError if a device lacks room for a file, or for what is known already of later ones."""
        total: dict[str, int] = {}
        sole = self._placement.sole()
        for source in (first, *later):
            if source is first or source.has(0, source.size):
                for name, (_, size) in self._lay_out(source, source.header(source.pause)).items():
                    total[name] = total.get(name, 0) + (0 if self._attach(source, name) is not None else size)
            elif sole in self._lanes and self._dtype is None and not self._tier_for(self._lanes[sole].ring.device):
                total[sole] = total.get(sole, 0) + source.size
        for name, size in total.items():
            device = self._lanes[name].ring.device
            if size > (free := device.free_bytes()) and self._tier:
                self._tier.make_room(device, size - free)
                free = device.free_bytes()
            if size > free:
                raise _no_room(device, size, free)

    def _tier_for(self, device: Device) -> Tier | None:
        """Where weights on that device are attached from, and left."""
        return self._tier if self._tier and self._tier.takes(device) else None

    def _allocate(self, source: Source, name: str) -> Tensor:
        """Memory for what goes to that device of this file, which has been laid out."""
        placed, size = self._layouts[source.path][name]
        device = self._lanes[name].ring.device
        while True:
            try:
                tier = self._tier_for(device)
                if not tier or not size:
                    return device.allocate(size)
                shared = device.share(size)
            except MemoryError as error:
                if not self._tier or not self._tier.make_room(device, size):
                    raise _no_room(device, size, device.free_bytes()) from error
            else:
                self._shared.append((tier, key(source.version, placed), device, shared))
                return shared.tensor

    # In the copiers' threads

    def _copy(self, lane: _Lane, slots: Sequence[Tensor]) -> None:
        on_the_way: list[Event | None] = [None] * len(slots)
        turn = 0
        while block := self._take(lane):
            if event := on_the_way[turn]:
                event.wait()
            self._fill(slots[turn], block)
            event = on_the_way[turn] = lane.ring.device.copy(block.target, slots[turn][: len(block.target)])
            with self._changed:
                lane.events[block.number] = event
                self._changed.notify_all()
            turn = (turn + 1) % len(slots)
            del block  # and with it the memory, should nobody else want it

    def _take(self, lane: _Lane) -> _Block | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or lane.waiting or self._is_planned)
            return lane.waiting.popleft() if lane.waiting and not self._is_over else None

    def _fill(self, slot: Tensor, block: _Block) -> None:
        """Put a block together, waiting for what is not there yet."""
        source, to = block.source, slot.data_ptr() - block.start
        for part in block.parts:
            step = part.stop - part.start if source.has(part.start, part.stop) else CHUNK_BYTES
            wide, narrow = part.file_dtype.itemsize, part.dtype.itemsize
            for start in range(part.start, part.stop, step):
                stop = min(part.stop, start + step)
                self._wait(source, start, stop)
                at = part.at + (start - part.start) // wide * narrow
                if part.file_dtype == part.dtype:
                    # Of the ways to copy that Python has, one that lets the other threads run, and starts none of its own.
                    ctypes.memmove(to + at, _address(source.view) + start, stop - start)
                else:
                    size = (stop - start) // wide * narrow
                    slot[at - block.start :][:size].view(part.dtype).copy_(elements(source.view, part.file_dtype, start, stop))

    def _wait(self, source: Source, start: int, stop: int) -> None:
        while not source.has(start, stop):
            self._pause(source)

    def _pause(self, source: Source) -> None:
        if self._is_over:
            raise self._error or _Over
        source.pause()


def _address(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))


def _no_room(device: Device, needed: int, free: int) -> WeightsError:
    return WeightsError(
        f"no room on device {device.name}: the weights need {needed:,} bytes, {free:,} are free; "
        "free some, spread them with a device map, or cast them to a smaller dtype"
    )
