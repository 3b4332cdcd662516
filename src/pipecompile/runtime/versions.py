"""The weights of one stage that learns: which version a forward reads, what keeps it, and the updates.

A forward records a graph over the tensors it reads, and autograd refuses to go back over one whose
tensors were changed in place since. So what a forward reads must be either unchanged until its
backward, a copy, or an alias whose changes autograd does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pipecompile.ir.learning import Rule
from pipecompile.runtime.step import Sums
from pipecompile.runtime.update import DeviceUpdates

Tensors = tuple[torch.Tensor, ...]


class _Policy(Protocol):
    """Which tensors a forward reads in place of the trained weights, and of which version they are."""

    def read(self, sample: int, version: int) -> tuple[Tensors, int]:
        """The tensors for the forward of a sample, and how many updates they have had."""
        ...

    def passed(self, sample: int) -> None:
        """The backward of a sample is over."""
        ...

    def updating(self, version: int, changes: bool) -> None:
        """The samples of one update are through, and ``changes`` are about to be made to ``version``."""
        ...

    def begin(self) -> None:
        """A stream begins; nothing is in flight."""
        ...


class _Own:
    """The weights themselves: nothing changes them between a forward and its backward.

    ``sync``, and every rule in the last stage, where the update of a sample follows its forward.
    """

    def __init__(self, weights: Tensors) -> None:
        self._weights = weights

    def read(self, sample: int, version: int) -> tuple[Tensors, int]:
        return self._weights, version

    def passed(self, sample: int) -> None: ...

    def updating(self, version: int, changes: bool) -> None: ...

    def begin(self) -> None: ...


class _Alias(_Own):
    """``stale`` and ``sideways``: aliases with version counters of their own, so that a backward sees updates."""

    def __init__(self, weights: Tensors) -> None:
        super().__init__(tuple(weight.data.requires_grad_() for weight in weights))


@dataclass
class _Copy:
    """Weights of one version, and the samples in flight that read them."""

    tensors: Tensors
    version: int
    readers: set[int] = field(default_factory=set[int])


class _Copies:
    """What the policies that keep older versions share: copies made once, and used again when nobody reads them."""

    def __init__(self, weights: Tensors) -> None:
        self._weights, self._spare = weights, list[Tensors]()
        self.made = 0

    def take(self, version: int) -> _Copy:
        """A copy of the weights as they are now."""
        if self._spare:
            tensors = self._spare.pop()
            with torch.no_grad():
                for copy, weight in zip(tensors, self._weights, strict=True):
                    copy.copy_(weight)
        else:
            tensors = tuple(weight.detach().clone().requires_grad_() for weight in self._weights)
            self.made += 1
        return _Copy(tensors, version)

    def give(self, copy: _Copy) -> None:
        """Nobody reads it any more."""
        self._spare.append(copy.tensors)


class _Stash:
    """``weight_stashing``: a forward reads the newest version, and keeps it until its backward."""

    def __init__(self, weights: Tensors) -> None:
        self.copies = _Copies(weights)
        self._newest: _Copy | None = None
        self._read: dict[int, _Copy] = {}

    def read(self, sample: int, version: int) -> tuple[Tensors, int]:
        if self._newest is None:
            self._newest = self.copies.take(version)
        copy = self._read[sample] = self._newest
        copy.readers.add(sample)
        return copy.tensors, copy.version

    def passed(self, sample: int) -> None:
        copy = self._read.pop(sample)
        copy.readers.discard(sample)
        if not copy.readers and copy is not self._newest:
            self.copies.give(copy)

    def updating(self, version: int, changes: bool) -> None:
        if changes:
            if self._newest is not None and not self._newest.readers:
                self.copies.give(self._newest)
            self._newest = None

    def begin(self) -> None:
        self.updating(0, True)  # values may have been loaded since


class _TwoVersions:
    """``2bw``: the samples of an update read the version before the newest one that is complete when they begin.

    Group ``g`` reads version ``max(0, g - 1)`` of its stream, whatever the stage.
    """

    def __init__(self, weights: Tensors, group: int) -> None:
        self.copies, self._size = _Copies(weights), group
        self._first = -1
        self._turns = 0
        self._kept: dict[int, _Copy] = {}

    def begin(self) -> None:
        for copy in {id(copy): copy for copy in self._kept.values()}.values():
            self.copies.give(copy)
        self._kept, self._turns, self._first = {}, 0, -1

    def read(self, sample: int, version: int) -> tuple[Tensors, int]:
        if self._first < 0:
            self._first = sample
        wanted = max(0, (sample - self._first) // self._size - 1)
        copy = self._keep(version) if wanted == self._turns else self._kept[wanted]
        return copy.tensors, copy.version

    def _keep(self, version: int) -> _Copy:
        if self._turns not in self._kept:
            self._kept[self._turns] = self.copies.take(version)
        return self._kept[self._turns]

    def passed(self, sample: int) -> None: ...

    def updating(self, version: int, changes: bool) -> None:
        # Group g is through: version g - 1, which it read last, is free; group g + 1 reads version g.
        spent = self._kept.pop(self._turns - 1, None)
        if spent is not None:
            self.copies.give(spent)
        self._keep(version)
        self._turns += 1


class StageWeights:
    """What ``weights`` is in a generated module: reads, gradients and updates of one stage.

    Args:
        rule: how the stream is learned from.
        stage: its number, of ``stages``.
        tensors: by placeholder name, those of the model.
        state: names of all a forward reads, in order.
        trained: those among them that have gradients.
        updates: the optimizer of the stage.
        snapshot: called with the state of the stage after a sample, where asked for.
        mutated: names of the buffers that forwards write to.
    """

    def __init__(
        self,
        rule: Rule,
        stage: int,
        stages: int,
        tensors: Mapping[str, torch.Tensor],
        state: Sequence[str],
        trained: Sequence[str],
        updates: DeviceUpdates,
        snapshot: Callable[[dict[str, Any]], None],
        *,
        mutated: Collection[str] = (),
    ) -> None:
        self._stage, self._updates, self._snapshot = stage, updates, snapshot
        self._tensors, self._mutated = tensors, [name for name in state if name in mutated]
        self._plain = [tensors[name] for name in state]
        self._places = [list(state).index(name) for name in trained]
        self._owned = updates.owned.get(stage, ())
        self.sums = Sums()
        for name in trained:
            self.sums.know(name, tensors[name])
        own = tuple(tensors[name] for name in trained)
        self._policy = _policy(rule, stage, stages, own)
        self.version = 0
        self._samples = 0
        self._marked: _Mark | None = None
        self._learns = bool(trained) or bool(self._owned)

    @property
    def copies(self) -> int:
        """How many sets of weights there are beside the model's own."""
        copies = getattr(self._policy, "copies", None)
        return 0 if copies is None else copies.made

    def begin(self) -> None:
        """A stream begins."""
        self._policy.begin()

    def read(self, sample: int, slip: torch.Tensor) -> tuple[Tensors, Tensors]:
        """All state for the forward of a sample, and what of it has gradients; the version goes onto the slip."""
        if self._marked is not None:
            self._marked.take(self._tensors, self._mutated)
        trained, version = self._policy.read(sample, self.version)
        slip[1 + self._stage] = version
        if slip[0]:
            self._marked = _Mark(sample)
        state = list(self._plain)
        for place, tensor in zip(self._places, trained, strict=True):
            state[place] = tensor
        return tuple(state), trained

    def learned(self) -> None:
        """The gradients of one more sample are in ``sums``."""
        self._samples += 1

    def passed(self, sample: int) -> None:
        """A sample needs nothing of this stage any more."""
        self._policy.passed(sample)
        if self._marked is not None and self._marked.sample == sample:
            self._marked.passed = True

    def update(self) -> None:
        """Apply the mean of the gradients since the last update, if there are any."""
        self._policy.updating(self.version, self._samples > 0)
        if self._samples:
            if self._samples > 1:
                for name, total in self.sums.values.items():
                    self.sums.values[name] = total / self._samples
            if self._owned:
                self._updates.update(self._stage, self.sums)
            self.version, self._samples = self.version + 1, 0
        if self._marked is not None and self._marked.passed:
            self._marked.take(self._tensors, self._mutated)
            self._snapshot(self._state(self._marked))
            self._marked = None

    def _state(self, mark: _Mark) -> dict[str, Any]:
        """A copy of what this stage has learned, with the buffers of the same sample."""
        tensors = {name: self._tensors[name].detach().clone() for name in self._owned}
        learned: dict[str, Any] = {}
        if self._learns:
            learned = {
                "version": self.version,
                "state": deepcopy(self._updates.state()),
                "groups": self._updates.groups(),
            }
        return {"sample": mark.sample, "tensors": {**tensors, **(mark.buffers or {})}, **learned}


@dataclass
class _Mark:
    """A snapshot asked for: buffers after the forward of ``sample``, weights after its update."""

    sample: int
    passed: bool = False
    buffers: dict[str, torch.Tensor] | None = None

    def take(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
        """Copy the buffers, before the next forward changes them."""
        if self.buffers is None:
            self.buffers = {name: tensors[name].detach().clone() for name in names}


def _policy(rule: Rule, stage: int, stages: int, weights: Tensors) -> _Policy:
    if rule.updates == "2bw" and stages > 1:
        return _TwoVersions(weights, rule.accumulate)
    if rule.updates == "sync" or not rule.ahead(stage, stages):
        return _Own(weights)
    return _Stash(weights) if rule.updates == "weight_stashing" else _Alias(weights)


__all__ = ["StageWeights"]
