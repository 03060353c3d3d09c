"""How the C library keeps memory for computing on a CPU."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of glibc's mallopt


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc keep the large buffers that XLA frees on a CPU, if there is no accelerator.

    It would give each back to the kernel, which has to clear the pages of the next one: up to a third of a training step
    (docs/results.md). Trimming is off altogether, because its threshold cannot exceed 2 GB. The other one holds for the heap of
    the first thread only, so there is one for all threads. Comes before JAX starts its own. Variables MALLOC_... of the
    environment go first.
    """
    if sys.platform == "linux" and not has_accelerator() and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        for setting, value in ((TRIM_THRESHOLD, -1), (MMAP_THRESHOLD, 2**31 - 1), (ARENA_MAX, 1)) if mallopt else ():
            mallopt(setting, value)


def has_accelerator() -> bool:
    """Whether JAX may find one, without asking it: it would start its threads."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None
