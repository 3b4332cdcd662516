"""An edge between lanes: the rings of one process with their tensors on a card, and marks instead of waiting.

Counting is the host's, as everywhere: a message is there once its copy has been handed over. So every end says to
the card what its count says to the host:

===================  ===============================================================================
the sender puts      the copy lane waits for the sender's lane, which makes the values, and for the
                     mark at which the receiver gave the slot away; it copies, and marks that
the receiver takes   its lane waits for that mark
the receiver posts   its lane marks: whatever reads the message that lay in the slot was given before
===================  ===============================================================================

Copies have a lane of their own, one an edge: they run beside what the devices compute, and none waits behind those
of another edge.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.local import LocalEdge, LocalSignal
from pipecompile.runtime.channels.ring import Ring, RingReceiver, RingSender
from pipecompile.runtime.lanes import Lane, Mark


@dataclass(frozen=True)
class Crossing:
    """The lanes of an edge, and the latest marks of its slots: ``given`` away by the receiver, ``filled`` by a copy.

    Without a ``source`` the caller sends: its values were there before the step. ``near`` brings a value of the
    caller's to where it can be copied from without the host.
    """

    source: Lane | None
    copies: Lane
    target: Lane
    near: Callable[[torch.Tensor], torch.Tensor]
    given: dict[int, Mark] = field(default_factory=dict[int, Mark])
    filled: dict[int, Mark] = field(default_factory=dict[int, Mark])

    def steady(self, value: Any) -> Any:
        """The value, which nobody overwrites before it is copied.

        One in a slot, as the gradient of a view may be, is copied by the lane that says when the slot is given away.
        """
        if not isinstance(value, torch.Tensor):
            return value
        if self.source is None:
            return self.near(value)
        return value if value.untyped_storage().resizable() else value.clone()

    @contextmanager
    def writing(self, slot: int) -> Generator[None]:
        """Copy into a slot inside: after the values are made and the slot is given away."""
        if self.source is not None:
            self.copies.wait(self.source.mark())
        self.copies.wait(self.given[slot])
        with self.copies.use():
            yield
        self.filled[slot] = self.copies.mark()


class LaneSender(RingSender):
    """The sending end."""

    __slots__ = ("_crossing",)

    def __init__(self, ring: Ring, signals: tuple[LocalSignal, LocalSignal], index: int, crossing: Crossing) -> None:
        super().__init__(ring, *signals, index)
        self._crossing = crossing

    def put(self, sample: int, *values: Any) -> None:
        """See :class:`RingSender`; the copy is handed over, not waited for."""
        self._turn(sample)  # raises, if it is out of turn, before anything is handed over
        crossing = self._crossing
        steady = tuple(map(crossing.steady, values))
        with crossing.writing(sample // self._stride % self._count):
            super().put(sample, *steady)
            for value in steady:
                if isinstance(value, torch.Tensor):
                    crossing.copies.keep(value)


class LaneReceiver(RingReceiver):
    """The receiving end."""

    __slots__ = ("_crossing",)

    def __init__(self, ring: Ring, signals: tuple[LocalSignal, LocalSignal], index: int, crossing: Crossing) -> None:
        super().__init__(ring, *signals, index)
        self._crossing = crossing

    def post(self, sample: int) -> None:
        """See :class:`RingReceiver`; the slot is free when the receiver's lane has got here."""
        self._crossing.given[self._slot(sample)] = self._crossing.target.mark()
        super().post(sample)

    def take(self) -> tuple[Any, ...] | None:
        """See :class:`RingReceiver`; the receiver's lane reads the values when they are there."""
        slot = self._slot(self.sample)
        values = super().take()
        self._crossing.target.wait(self._crossing.filled[slot])
        return values

    def own(self) -> list[Any] | None:
        """See :class:`RingReceiver`; copied by the receiver's lane."""
        self._crossing.target.wait(self._crossing.filled[self._slot(self.sample)])
        with self._crossing.target.use():
            return super().own()

    def _slot(self, sample: int) -> int:
        return sample // self._stride % self._count


class LaneEdge:
    """Both ends of an edge; ``card`` gives so many bytes where its tensors are to lie."""

    def __init__(
        self, edge: Edge, sizes: Mapping[str, int], card: Callable[[int], torch.Tensor], crossing: Crossing
    ) -> None:
        self._local, self._crossing = LocalEdge(edge, sizes, card), crossing

    def sender(self, index: int = 0) -> LaneSender:
        """The sending end."""
        return LaneSender(self._local.ring, self._local.signals, index, self._crossing)

    def receiver(self, index: int = 0) -> LaneReceiver:
        """The receiving end."""
        return LaneReceiver(self._local.ring, self._local.signals, index, self._crossing)


__all__ = ["Crossing", "LaneEdge", "LaneReceiver", "LaneSender"]
