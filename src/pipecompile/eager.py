"""A switch, one a thread: decorated models run their own ``forward`` while it is on."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

_local = threading.local()


def running_eager() -> bool:
    """Whether decorated models are to run their own ``forward`` in this thread for now."""
    return getattr(_local, "depth", 0) > 0


@contextmanager
def eager_models() -> Generator[None]:
    """Run decorated models as plain modules, as capture must and as they do themselves at times."""
    _local.depth = getattr(_local, "depth", 0) + 1
    try:
        yield
    finally:
        _local.depth -= 1
