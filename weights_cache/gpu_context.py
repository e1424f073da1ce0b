"""A GPU's context, made before torch is there to make it."""

import ctypes
import re

_GPU = re.compile(r"cuda(?::(\d+))?")


def begin(device: str) -> None:
    """Make the context of `cuda` or `cuda:<number>` that torch will find and use; any other device has none.

    It takes the driver tenths of a second, in which other threads run: the import of torch takes longer. What goes wrong is torch's to say.
    """
    found = _GPU.fullmatch(device)
    if not found:
        return
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    number, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(number), int(found[1] or 0)) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)  # and never released, as torch never does
