"""Keep freed activations with the process.

By default glibc gives large blocks back to the system and faults them in again at the next use,
page by page: on a convolution stage with activations of 3 MB that was a quarter of the time.
Workers are started with other thresholds; measurements are made with the same ones.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Generator

_TRIM, _TOP_PAD, _MMAP = -1, -2, -3
_KEEP = {_TRIM: 1 << 30, _TOP_PAD: 16 << 20, _MMAP: 1 << 30}
# What glibc's own adjustment arrives at in a process that has used large blocks. The initial
# values would be worse: setting any of them ends that adjustment.
_USUAL = {_TRIM: 64 << 20, _TOP_PAD: 128 << 10, _MMAP: 32 << 20}

#: Environment of the workers. Other C libraries ignore it.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(_KEEP[_TRIM]),
    "MALLOC_TOP_PAD_": str(_KEEP[_TOP_PAD]),
    "MALLOC_MMAP_THRESHOLD_": str(_KEEP[_MMAP]),
}


@contextlib.contextmanager
def keeping() -> Generator[None]:
    """Let this process allocate as workers do; afterwards give back what was kept."""
    try:
        library = ctypes.CDLL(None)
        mallopt, trim = library.mallopt, library.malloc_trim
    except (OSError, TypeError, AttributeError):
        yield
        return
    for option, value in _KEEP.items():
        mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _USUAL.items():
            mallopt(option, value)
        trim(0)


def give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
