"""Edges between processes of one machine: memory from memfd, signals by eventfd, no names anywhere."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from pipecompile.errors import PipelineError
from pipecompile.ir.cluster import Link
from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.ring import Ring, RingLayout, RingReceiver, RingSender, clock


def allocate(name: str, nbytes: int) -> int:
    """The descriptor of ``nbytes`` (at least one page) of anonymous shared memory.

    Raises:
        PipelineError: where the platform has no memfd or no memory left.
    """
    if not hasattr(os, "memfd_create") or not hasattr(os, "eventfd"):
        raise PipelineError("worker processes need Linux (memfd and eventfd); use the inline executor here")
    try:
        fd = os.memfd_create(f"pipecompile-{name}", os.MFD_CLOEXEC)
    except OSError as error:
        raise PipelineError(f"cannot create shared memory for {name}: {error}; use the inline executor") from error
    try:
        os.ftruncate(fd, max(nbytes, mmap.PAGESIZE))
    except OSError as error:
        os.close(fd)
        raise PipelineError(f"cannot reserve {nbytes} bytes of shared memory for {name}: {error}") from error
    return fd


def attach(fd: int) -> mmap.mmap:
    """Map all of a descriptor made by :func:`allocate`, shared and writable."""
    mapped = mmap.mmap(fd, 0)
    # Large pages where the system offers them on request; elsewhere this changes nothing.
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


#: The lower half of an eventfd counts; the upper half is there to wake its reader without a message.
_COUNT = (1 << 32) - 1


#: One turn of the loop takes about 2 us: after so long somebody else has had the core.
_PREEMPTED_SECONDS = 0.0005
#: For how long the core is then left to others while waiting.
_YIELD_SECONDS = 1.0


def rouse(fd: int) -> None:
    """Wake the reader of a signal that a device waits for: it sees to its ``awake`` word and waits on."""
    os.eventfd_write(fd, _COUNT + 1)


class EventSignal:
    """An eventfd. The descriptor blocks: only its one reader reads, after a poll where it must not block.

    Args:
        fd: the descriptor.
        awake: one word, a time. Before it the reader looks again and again in place of sleeping:
            a core that sleeps takes its time to come back, and is slower at first. Where somebody
            else wants the core it sleeps after all.
    """

    def __init__(self, fd: int, awake: memoryview[float] | None = None) -> None:
        self.fd = fd
        self.add = partial(os.eventfd_write, fd, 1)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._asleep_until = 0.0
        self.wait = partial(os.eventfd_read, fd) if awake is None else partial(self._watchful, awake)

    def read(self) -> int:
        """Empty the counter without blocking and return what it held (perhaps 0)."""
        return os.eventfd_read(self.fd) & _COUNT if self._poll.poll(0) else 0

    def _watchful(self, awake: memoryview[float]) -> int:
        fd, poll = self.fd, self._poll.poll
        while True:
            until, last = awake[0], clock()
            if last > self._asleep_until:
                while last < until and not poll(0):
                    now = clock()
                    # After a call the caller itself may have had the core.
                    if now - last > _PREEMPTED_SECONDS and awake[0] == until > now:
                        self._asleep_until = now + _YIELD_SECONDS
                        break
                    until, last = awake[0], now
            if count := os.eventfd_read(fd) & _COUNT:
                return count


@dataclass(frozen=True)
class SharedEdge:
    """The descriptors of one edge, in whichever process they are open."""

    layout: RingLayout
    memory: int
    arrivals: int
    credits: int

    @classmethod
    def create(cls, edge: Edge, sizes: Mapping[str, int]) -> SharedEdge:
        """Allocate memory and signals. The caller closes the descriptors."""
        layout = RingLayout.of(edge, sizes)
        memory = allocate(edge.name, layout.nbytes)
        arrivals, credits = (os.eventfd(0, os.EFD_CLOEXEC) for _ in range(2))
        return cls(layout, memory, arrivals, credits)

    @property
    def fds(self) -> tuple[int, int, int]:
        """Everything that has to be passed on and closed."""
        return self.memory, self.arrivals, self.credits

    def sender(self, index: int = 0, awake: memoryview[float] | None = None) -> RingSender:
        """The sending end. Make at most one of each end per edge."""
        ring = Ring.map(attach(self.memory), self.layout)
        return RingSender(ring, EventSignal(self.arrivals), EventSignal(self.credits, awake), index)

    def receiver(
        self, index: int = 0, throttle: Link | None = None, awake: memoryview[float] | None = None
    ) -> RingReceiver:
        """The receiving end."""
        ring = Ring.map(attach(self.memory), self.layout)
        return RingReceiver(ring, EventSignal(self.arrivals, awake), EventSignal(self.credits), index, throttle)
