"""A GPU's memory with file descriptors: CUDA's virtual memory management, by the driver's bindings, which torch's CUDA builds bring.

Physical memory (cuMemCreate) and the addresses where it is seen (cuMemMap) are two things there. The first lives as long as a handle, a
mapping or an exported descriptor of it does, in whatever process: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__VA.html
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import torch
from cuda.bindings import driver
from torch import Tensor

from weights_cache.errors import WeightsError

_DESCRIPTOR = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_READ = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
_READ_WRITE = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE


class CudaMemory:
    """The memory of one GPU."""

    def __init__(self, index: int) -> None:
        """index: torch's, which is the driver's. Raises WeightsError if the GPU's memory cannot be shared."""
        _call("cuInit", 0)
        self._index = index
        self._device = _call("cuDeviceGet", index)
        supported = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
        if not _call("cuDeviceGetAttribute", supported, self._device):
            raise WeightsError("the GPU gives no file descriptors of its memory")
        self._context = _call("cuDevicePrimaryCtxRetain", self._device)  # torch's; never released, as it never goes
        # Of a part of a GPU the newer call has the part's own.
        name = "cuDeviceGetUuid_v2" if hasattr(driver, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
        self.uuid = f"GPU-{UUID(bytes=bytes(_call(name, self._device).bytes)[:16])}"  # as nvidia-smi has it
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = index
        self._properties.requestedHandleTypes = _DESCRIPTOR
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granularity = int(_call("cuMemGetAllocationGranularity", self._properties, minimum))

    def create(self, size: int) -> "CudaShared":
        """So many bytes, to be written and shared. Raises MemoryError."""
        with self._current():
            handle = _call("cuMemCreate", self._rounded(size), self._properties, 0)
            try:
                pointer = self._map(handle, size, _READ_WRITE)
            except BaseException:
                _call("cuMemRelease", handle)
                raise
        return CudaShared(self, handle, pointer, self._tensor(pointer, size))

    def adopt(self, descriptor: int, size: int) -> Tensor:
        """Memory that another process has created and sealed; the descriptor stays the caller's. Raises WeightsError or MemoryError."""
        with self._current():
            handle = _call("cuMemImportFromShareableHandle", descriptor, _DESCRIPTOR)
            try:
                pointer = self._map(handle, size, _READ)
            finally:
                _call("cuMemRelease", handle)  # the mapping keeps what it needs
        return self._tensor(pointer, size)

    def _rounded(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def _map(self, handle: Any, size: int, access: Any) -> int:
        length = self._rounded(size)
        pointer = _call("cuMemAddressReserve", length, 0, 0, 0)
        try:
            _call("cuMemMap", pointer, length, 0, handle, 0)
            try:
                self.allow(int(pointer), size, access)
            except BaseException:
                _call("cuMemUnmap", pointer, length)
                raise
        except BaseException:
            _call("cuMemAddressFree", pointer, length)
            raise
        return int(pointer)

    def allow(self, pointer: int, size: int, access: Any) -> None:
        """What kernels and copies may do with a mapping. Raises WeightsError."""
        wanted = driver.CUmemAccessDesc()
        wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        wanted.location.id = self._index
        wanted.flags = access
        with self._current():
            _call("cuMemSetAccess", pointer, self._rounded(size), [wanted], 1)

    def _tensor(self, pointer: int, size: int) -> Tensor:
        mapping = _Mapping(pointer, size)
        # At the process's end the driver does it, when nothing runs on the device any more.
        weakref.finalize(mapping, self._unmap, pointer, size).atexit = False
        return torch.as_tensor(mapping, device=torch.device("cuda", self._index))  # which keeps the mapping

    def _unmap(self, pointer: int, size: int) -> None:
        with contextlib.suppress(WeightsError), self._current():  # a context that a kernel has broken answers nothing
            _call("cuCtxSynchronize")  # nothing reads it any more
            _call("cuMemUnmap", pointer, self._rounded(size))
            _call("cuMemAddressFree", pointer, self._rounded(size))

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context in this thread, which may have another one, or none."""
        _call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent")


class CudaShared:
    """Memory that this process has created."""

    def __init__(self, memory: CudaMemory, handle: Any, pointer: int, tensor: Tensor) -> None:
        self.tensor = tensor
        self._memory = memory
        self._handle = handle
        self._pointer = pointer

    def seal(self) -> None:
        """To be read only, also here."""
        self._memory.allow(self._pointer, self.tensor.nbytes, _READ)

    def descriptor(self) -> int:
        """Of the physical memory."""
        return int(_call("cuMemExportToShareableHandle", self._handle, _DESCRIPTOR, 0))

    def close(self) -> None:
        """Let the handle go; the mapping keeps the memory."""
        with contextlib.suppress(WeightsError):  # as below
            _call("cuMemRelease", self._handle)


class _Mapping:
    """What torch makes a tensor of without a copy."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}


def _call(name: str, *arguments: Any) -> Any:
    """A function of the driver: what it returns. Raises MemoryError or WeightsError."""
    result, *found = getattr(driver, name)(*arguments)
    if result == driver.CUresult.CUDA_SUCCESS:
        return found[0] if found else None
    text = f"{name}: {result.name}"
    raise MemoryError(text) if result == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else WeightsError(text)
