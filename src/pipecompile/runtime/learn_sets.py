"""Sets of one stage's weights: the model's own, and those that samples under way still need.

An optimizer writes in place, and what a forward has read must not change before its backward. So
where the newest set is being read, an update moves the weights to another first: it copies the
newest there and goes on in it. Nothing is kept twice; S - s versions are S - s sets.

Further sets lie in memory that the caller shares, behind a word that says which is the newest. If a
worker is lost, or another fails, the caller fetches the last complete update from there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipecompile.runtime.arena import open_state
from pipecompile.runtime.channels.cells import aligned
from pipecompile.runtime.channels.shared_memory import allocate, attach

Tensors = tuple[torch.Tensor, ...]

#: Bytes in front of the sets for the word that says which is the newest.
_HEAD = aligned(8)


class WeightSets:
    """The sets of some weights. ``weights`` themselves always have the memory of the newest one.

    Set 0 is the memory the weights have now; ``more`` gives the memory of a further one. What
    forwards read are aliases, whose version counters an optimizer's writes do not touch.
    """

    def __init__(self, weights: Tensors, more: Callable[[], Tensors] | None = None, word: Any = None) -> None:
        self._weights, self._more = weights, more or (lambda: _alike(weights))
        self._word = torch.zeros(1, dtype=torch.int64) if word is None else word
        self._sets = [_aliases(weights)]
        self.newest = 0

    def __len__(self) -> int:
        """How many there are, the model's own among them."""
        return len(self._sets)

    def read(self) -> Tensors:
        """The newest."""
        return self._sets[self.newest]

    def __getitem__(self, number: int) -> Tensors:
        return self._sets[number]

    def move(self, busy: Collection[int]) -> None:
        """Have the next update write to a set that is not ``busy``, with the values of the newest."""
        free = next((i for i in range(len(self._sets)) if i != self.newest and i not in busy), len(self._sets))
        if free == len(self._sets):
            self._sets.append(_aliases(self._more()))
        self._go(free)

    def updated(self) -> None:
        """An update is complete."""
        self._word[0] = self.newest

    def settle(self) -> None:
        """Nothing is under way: the newest values go to the model's own memory."""
        if self.newest:
            self._go(0)
            self.updated()

    def _go(self, to: int) -> None:
        for weight, value, place in zip(self._weights, self.read(), self._sets[to], strict=True):
            weight.data = place.data.copy_(value.data)
        self.newest = to


def _aliases(weights: Tensors) -> Tensors:
    return tuple(weight.data.requires_grad_() for weight in weights)


def _alike(weights: Tensors) -> Tensors:
    """Memory laid out as theirs is, where it is shared among them too."""
    return tuple(copy.deepcopy([weight.data for weight in weights]))


@dataclass(frozen=True)
class SharedSets:
    """``count`` further sets of the weights that ``entries`` describe (for :func:`open_state`), in one memory."""

    fd: int
    entries: tuple[dict[str, Any], ...]
    nbytes: int
    count: int

    @classmethod
    def create(cls, entries: Sequence[Mapping[str, Any]], count: int) -> SharedSets:
        """Reserve the memory; it is used as sets are. The caller closes the descriptor.

        Raises:
            PipelineError: where there is none left.
        """
        places: dict[Any, int] = {}
        total = 0
        for entry in entries:
            key = entry["arena"], entry["offset"]
            if entry["arena"] >= 0 and key not in places:
                places[key] = total
                total = aligned(total + entry["nbytes"])
        moved = [
            {**e, "arena": 0, "offset": places[e["arena"], e["offset"]]} if e["arena"] >= 0 else dict(e)
            for e in entries
        ]
        return cls(allocate("weight-sets", _HEAD + count * total), tuple(moved), total, count)

    def open(self) -> tuple[Any, list[Tensors]]:
        """The word and all further sets, in whichever process the descriptor is open."""
        word = torch.frombuffer(attach(self.fd), dtype=torch.int64, count=1)
        starts = [_HEAD + number * self.nbytes for number in range(self.count)]
        return word, [
            open_state([self.fd], [{**e, "offset": e["offset"] + start} for e in self.entries]) for start in starts
        ]


def fetch(word: Any, sets: Sequence[Tensors], weights: Tensors) -> None:
    """Put the newest of the further sets, if one is, into the model's own memory. Whoever wrote to them is gone."""
    newest = int(word[0])
    if newest:
        for weight, value in zip(weights, sets[newest - 1], strict=True):
            weight.data.copy_(value.data)
        word[0] = 0


__all__ = ["SharedSets", "WeightSets", "fetch"]
