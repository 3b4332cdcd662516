"""How the micro-batches of a step are dealt to data-parallel pipelines: in turn, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Deal:
    """What one pipeline of ``pipelines`` gets: micro-batches ``pipeline``, ``pipeline + pipelines`` and so on.

    Each pipeline counts its own from 0, as its program and its rings do.
    """

    pipeline: int = 0
    pipelines: int = 1

    def number(self, own: int) -> int:
        """The step's number of a pipeline's own micro-batch."""
        return own * self.pipelines + self.pipeline

    def owns(self, number: int) -> bool:
        """Whether it gets the micro-batch of that number."""
        return number % self.pipelines == self.pipeline

    def count(self, parts: int) -> int:
        """How many it gets of so many."""
        return max(0, -(-(parts - self.pipeline) // self.pipelines))


def gathered(own: Sequence[Sequence[T]]) -> list[T]:
    """What the pipelines made, one item a micro-batch, in the step's order."""
    turns = max(map(len, own), default=0)
    return [made[turn] for turn in range(turns) for made in own if turn < len(made)]


__all__ = ["Deal", "gathered"]
