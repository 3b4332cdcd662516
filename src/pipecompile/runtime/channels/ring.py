"""Rings of preallocated slots and their two ends; a carrier only adds memory and signals.

A receiver posts a slot (one credit to the sender), the sender fills it and announces it (one
arrival to the receiver). Posting message ``i + slots`` gives the slot of message ``i`` away, so
there is no separate release. Both ends count for themselves and ask the carrier only when their
count is used up. The end of a stream needs no slot: the sender leaves word of it beside them, and
announces that as it does a message.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipecompile.errors import PipelineError
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import ALIGNMENT
from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.cells import Cell, capacity, make_cell

_HEADER = ALIGNMENT
_SEQUENCE, _FLAGS, _SENT = 0, 1, 2
_FAILED = 1

clock = time.monotonic


class SampleFailed(Exception):
    """The message taken stands for a sample that a stage before could not compute."""

    def __init__(self, sample: int) -> None:
        super().__init__(f"sample {sample} failed in an earlier stage")
        self.sample = sample


class Signal(Protocol):
    """A counter one side adds to and the other side empties."""

    @property
    def add(self) -> Callable[[], Any]:
        """Add one and wake who waits."""
        ...

    @property
    def wait(self) -> Callable[[], int]:
        """Block until the counter is positive, empty it and return what it held."""
        ...

    @property
    def read(self) -> Callable[[], int]:
        """Empty the counter without blocking and return what it held (perhaps 0)."""
        ...


@dataclass(frozen=True)
class RingLayout:
    """Where everything lies in the memory of an edge: ``slots`` times header and cells, then the end word."""

    edge: Edge
    rooms: tuple[int, ...]

    @classmethod
    def of(cls, edge: Edge, sizes: Mapping[str, int]) -> RingLayout:
        """Both ends compute the same layout from the edge and the bounds of its dynamic sizes."""
        return cls(edge, tuple(capacity(spec, sizes) for spec in edge.specs))

    @property
    def slot_nbytes(self) -> int:
        """Bytes from one slot to the next."""
        return _HEADER + sum(self.rooms)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole ring."""
        return self.slot_nbytes * self.edge.slots + _HEADER


class Slot:
    """One place for a message. ``values`` holds the views where they never change."""

    __slots__ = ("cells", "clock", "header", "posted", "values")

    def __init__(self, memory: mmap.mmap, layout: RingLayout, index: int, card: torch.Tensor | None = None) -> None:
        start = layout.slot_nbytes * index
        words = memoryview(memory)[start : start + _HEADER]
        self.header, self.clock = words.cast("q"), words.cast("d")
        # Either end may write this: nothing is sent before both are there.
        self.header[_SEQUENCE] = -1
        self.posted = 0.0
        cells: list[Cell] = []
        at = start + _HEADER
        for name, spec, room in zip(layout.edge.values, layout.edge.specs, layout.rooms, strict=True):
            cells.append(make_cell(memory, at, name, spec, room, card))
            at += room
        self.cells = tuple(cells)
        fixed = all(spec.kind == "tensor" and not spec.dynamic for spec in layout.edge.specs)
        self.values: tuple[Any, ...] | None = tuple(cell.load() for cell in cells) if fixed else None


@dataclass(frozen=True)
class Ring:
    """A ring as one process sees it. ``last[0]`` is one more than the message the stream ended before, or 0."""

    edge: Edge
    slots: tuple[Slot, ...]
    last: memoryview

    @classmethod
    def map(cls, memory: mmap.mmap, layout: RingLayout, card: torch.Tensor | None = None) -> Ring:
        """The ring in mapped memory. Its views must be ordinary tensors, whatever mode the caller is in.

        With ``card``, as many bytes elsewhere, tensors lie there, and all else in ``memory``.
        """
        with torch.inference_mode(False), torch.no_grad():
            slots = tuple(Slot(memory, layout, index, card) for index in range(layout.edge.slots))
        return cls(layout.edge, slots, memoryview(memory)[layout.nbytes - _HEADER : layout.nbytes].cast("q"))


class RingSender:
    """The sending end. ``sample`` is the next message to put; they are ``stride`` apart."""

    __slots__ = (
        "_add", "_count", "_credit", "_last", "_read", "_reserve", "_slots", "_stride", "_wait",
        "edge", "index", "sample",
    )  # fmt: skip

    def __init__(self, ring: Ring, arrivals: Signal, credits: Signal, index: int = 0) -> None:
        self.edge, self.index, self.sample = ring.edge.name, index, ring.edge.first
        self._slots, self._count, self._credit, self._reserve = ring.slots, len(ring.slots), 0, 0
        self._stride, self._last = ring.edge.stride, ring.last
        self._add, self._wait, self._read = arrivals.add, credits.wait, credits.read

    def late(self, on: bool) -> None:
        """Be ready only when the receiver has posted all slots, so that a message waits for nobody."""
        self._reserve = self._count - 1 if on else 0

    def ready(self) -> bool:
        """Whether the receiver has posted a slot."""
        if self._credit <= self._reserve:
            self._credit += self._read()
        return self._credit > self._reserve

    def take(self) -> None:
        """Block until the receiver has posted a slot."""
        if not self._credit:
            self._credit = self._wait()

    def refill(self) -> None:
        """Count the slots posted, without blocking."""
        self._credit += self._read()

    def check(self, values: tuple[Any, ...]) -> None:
        """Raise :class:`InputError` if the values do not fit, before anything is written."""
        for cell, value in zip(self._slots[0].cells, values, strict=True):
            cell.check(value)

    def put(self, sample: int, *values: Any) -> None:
        """Copy the values into the slot of message ``sample`` and signal the receiver.

        Raises:
            PipelineError: if the message is out of turn or no slot is posted.
            InputError: if a value does not fit its spec.
        """
        slot = self._turn(sample)
        for cell, value in zip(slot.cells, values, strict=True):
            cell.store(value)
        self._announce(slot, 0)

    def go_on(self, sample: int) -> None:
        """Make ``sample`` the next message, where those before it are left out. Both ends, with nothing on its way."""
        self.sample = sample

    def end(self) -> None:
        """Tell the receiver that no message follows. Needs no posted slot: it may never post again."""
        self._last[0] = self.sample + 1
        self._add()

    def fail(self, sample: int) -> None:
        """Tell the receiver that message ``sample`` will hold no values (needs a posted slot)."""
        self._announce(self._turn(sample), _FAILED)

    def _turn(self, sample: int) -> Slot:
        if sample != self.sample:
            raise PipelineError(f"edge {self.edge}: message {sample} was put when {self.sample} was due")
        if not self._credit:
            raise PipelineError(f"edge {self.edge}: message {sample} was put into a slot that is not posted")
        return self._slots[sample // self._stride % self._count]

    def _announce(self, slot: Slot, flags: int) -> None:
        slot.header[_SEQUENCE] = self.sample
        slot.header[_FLAGS] = flags
        slot.clock[_SENT] = clock()
        self._credit -= 1
        self.sample += self._stride
        self._add()


class RingReceiver:
    """The receiving end. ``sample`` is the next message to take, ``reach`` later the one that reuses its slot.

    With a ``throttle`` a message counts as arrived only when a link of that latency and
    bandwidth, carrying one message at a time, would have delivered it.
    """

    __slots__ = (
        "_add", "_count", "_due", "_end", "_last", "_posted", "_read", "_slots", "_stride", "_throttle", "_wait",
        "available", "edge", "ended", "index", "reach", "sample",
    )  # fmt: skip

    def __init__(
        self, ring: Ring, arrivals: Signal, credits: Signal, index: int = 0, throttle: Link | None = None
    ) -> None:
        self.edge, self.index, self.available, self.ended = ring.edge.name, index, 0, False
        self.sample = self._posted = ring.edge.first
        self._slots, self._count, self._end = ring.slots, len(ring.slots), ring.last
        self._stride, self.reach = ring.edge.stride, ring.edge.reach
        self._add, self._wait, self._read = credits.add, arrivals.wait, arrivals.read
        self._throttle, self._last, self._due = throttle, 0.0, -1.0

    def post(self, sample: int) -> None:
        """Offer the sender a slot for message ``sample``.

        Raises:
            PipelineError: if it is out of turn, or its slot holds a message not yet taken.
        """
        if sample != self._posted or sample - self.sample >= self.reach:
            raise PipelineError(
                f"edge {self.edge}: message {sample} was posted when {self._posted} was due and {self.sample} was next "
                f"to take ({self._count} slots)"
            )
        self._posted = sample + self._stride
        if self._throttle is not None:
            self._slots[sample // self._stride % self._count].posted = clock()
        self._add()

    def go_on(self, sample: int) -> None:
        """Make ``sample`` the next message, where those before it are left out. Both ends, with nothing on its way."""
        self.sample = self._posted = sample

    def post_until(self, end: int) -> None:
        """Offer every slot that is free for a message before ``end``."""
        while self._posted < end and self._posted - self.sample < self.reach:
            self.post(self._posted)

    def post_all(self) -> None:
        """Offer every slot there is."""
        for _ in range(self._count):
            self.post(self._posted)

    def refill(self) -> None:
        """Count what has arrived, without blocking."""
        self.available += self._read()

    def ready(self) -> bool:
        """Whether the next message is there."""
        if not self.available:
            self.available = self._read()
        return self.available > 0 and self.delay() <= 0.0

    def delay(self) -> float:
        """Seconds until the throttle delivers the next available message; 0 without one."""
        return 0.0 if self._throttle is None or not self.available else max(0.0, self._delivery() - clock())

    def take(self) -> tuple[Any, ...] | None:
        """The values of the next message, in place, or None at the end. Blocks until it is there.

        Raises:
            SampleFailed: if the message stands for a sample that failed; it has been taken.
        """
        slot = self._next()
        if slot is None:
            return None
        if slot.values is not None:
            return slot.values
        return tuple([cell.load() for cell in slot.cells])

    def own(self) -> list[Any] | None:
        """As :meth:`take`, but the values own their memory."""
        slot = self._next()
        return None if slot is None else [cell.own() for cell in slot.cells]

    def skip(self) -> bool:
        """Take the next message without looking at it; False at the end."""
        try:
            return self._next() is not None
        except SampleFailed:
            return True

    def _next(self) -> Slot | None:
        if self.ended:
            raise PipelineError(f"edge {self.edge}: a message was awaited after the end of the stream")
        if not self.available:
            self.available = self._wait()
        if self._throttle is not None:
            while (remaining := self._delivery() - clock()) > 0:
                time.sleep(remaining)
            self._last, self._due = self._due, -1.0
        self.available -= 1
        sample = self.sample
        slot = self._slots[sample // self._stride % self._count]
        if slot.header[_SEQUENCE] != sample:
            if self._end[0] == sample + 1:
                self.ended = True
                return None
            found = slot.header[_SEQUENCE]
            raise PipelineError(f"edge {self.edge}: message {sample} was due, but its slot holds {found}")
        self.sample = sample + self._stride
        if slot.header[_FLAGS]:
            raise SampleFailed(sample)
        return slot

    def _delivery(self) -> float:
        """When the throttle delivers the message due (known to have been sent)."""
        if self._due < 0.0:
            slot = self._slots[self.sample // self._stride % self._count]
            if slot.header[_SEQUENCE] != self.sample:
                return 0.0  # the end
            self._due = max(slot.clock[_SENT], slot.posted, self._last)
            if self._throttle is not None and not slot.header[_FLAGS]:
                self._due += self._throttle.seconds(sum(cell.size() for cell in slot.cells))
        return self._due
