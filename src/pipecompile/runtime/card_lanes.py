"""The lanes of a training step on one card: one for each device, one for the copies of each edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from pipecompile.errors import PipelineError, StepError
from pipecompile.ir.program import Edge
from pipecompile.ir.tree import flatten, unflatten
from pipecompile.runtime.channels.lane_edge import Crossing, LaneEdge
from pipecompile.runtime.lanes import EdgeEnds, Lane, Mark, remark


class Card(Protocol):
    """What lanes need of a card: implemented by CUDA, and by a record of what was asked of it in tests."""

    @property
    def name(self) -> str:
        """As torch calls it, such as ``cuda:0``."""
        ...

    @property
    def cards(self) -> Sequence[int]:
        """Its number, for the state of random numbers."""
        ...

    def lane(self) -> Lane:
        """A new one."""
        ...

    def caller(self) -> Lane:
        """The one the calling thread uses at the moment."""
        ...

    def memory(self, nbytes: int) -> torch.Tensor:
        """Bytes for slots. Its storage must not be resizable: that is how generated code knows a slot."""
        ...

    def near(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the caller's where a lane can copy it from without the host."""
        ...

    def here(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the caller's on the card, copied by the caller's lane if it is elsewhere."""
        ...

    def seconds(self, start: Mark, end: Mark) -> float:
        """Time between two marks that are reached."""
        ...


class CardLanes:
    """Implements :class:`pipecompile.runtime.lanes.Lanes` on a card."""

    def __init__(self, card: Card) -> None:
        self._card, self.cards = card, card.cards
        self._devices: dict[int | None, Lane] = {}  # None: what the caller receives
        self._copies: list[Lane] = []
        self._origin: Mark = None

    def begin(self) -> None:
        """See ``Lanes``."""
        self._origin = self._card.caller().mark()
        for lane in self._all:
            lane.wait(self._origin)

    def finish(self) -> None:
        """See ``Lanes``."""
        try:
            for lane in self._all:
                lane.finish()
        except torch.AcceleratorError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise StepError(f"{self._card.name} failed in a training step: {reason}{remark(error)}") from error

    def _of(self, device: int | None) -> Lane:
        if device not in self._devices:
            self._devices[device] = self._card.lane()
            if self._origin is not None:
                self._devices[device].wait(self._origin)
        return self._devices[device]

    @property
    def _all(self) -> list[Lane]:
        return [*self._devices.values(), *self._copies]

    def of(self, device: int) -> AbstractContextManager[Any]:
        """See ``Lanes``."""
        return self._of(device).use()

    def edge(self, edge: Edge, sizes: Mapping[str, int], source: int | None, target: int | None) -> EdgeEnds:
        """See ``Lanes``.

        Raises:
            PipelineError: if the card has no memory left for it.
        """
        copies = self._card.lane()
        begin = None if source is None else self._of(source)
        crossing = Crossing(begin, copies, self._of(target), self._card.near)
        try:
            found = LaneEdge(edge, sizes, self._card.memory, crossing)
        except torch.OutOfMemoryError as error:
            raise PipelineError(
                f"{self._card.name} has no memory left for the {edge.slots} slots of {edge.nbytes} bytes of edge "
                f"{edge.name}: {error}{remark(error)}"
            ) from error
        self._copies.append(copies)
        return found

    def here(self, nest: Any) -> Any:
        """See ``Lanes``."""
        leaves, tree = flatten(nest)
        try:
            return unflatten(tree, [self._card.here(leaf) for leaf in leaves])
        except torch.OutOfMemoryError as error:
            raise StepError(
                f"{self._card.name} has no memory left for the targets of a step: {error}{remark(error)}"
            ) from error

    def now(self, device: int) -> Mark:
        """See ``Lanes``."""
        return self._of(device).mark()

    def seconds(self, moment: Mark) -> float:
        """See ``Lanes``: from the beginning of the step on."""
        return self._card.seconds(self._origin, moment)


__all__ = ["Card", "CardLanes"]
