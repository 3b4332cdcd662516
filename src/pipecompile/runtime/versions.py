"""The weights of one stage that learns: which version a forward reads, what keeps it, and the updates.

A forward records a graph over the tensors it reads, and autograd refuses to go back over one whose
tensors were changed in place since. So what a forward reads must be either unchanged until its
backward, or an alias whose changes autograd does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any, Protocol

import torch

from pipecompile.ir.learning import MARKED, UNJUDGED, Rule
from pipecompile.runtime.learn_buffers import Buffers
from pipecompile.runtime.learn_gradients import Gradients
from pipecompile.runtime.learn_sets import Tensors, WeightSets
from pipecompile.runtime.step import Sums
from pipecompile.runtime.update import DeviceUpdates


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

    ``sync``, and every rule but ``2bw`` in the last stage, where the update of a sample follows its forward.
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

    def __init__(self, sets: WeightSets) -> None:
        super().__init__(sets.read())


class _Stash:
    """``weight_stashing``: a forward reads the newest set, which stays as it is until its backward."""

    def __init__(self, sets: WeightSets) -> None:
        self._sets = sets
        self._read: dict[int, int] = {}

    def read(self, sample: int, version: int) -> tuple[Tensors, int]:
        self._read[sample] = self._sets.newest
        return self._sets.read(), version

    def passed(self, sample: int) -> None:
        del self._read[sample]

    def updating(self, version: int, changes: bool) -> None:
        busy = set(self._read.values())
        if changes and self._sets.newest in busy:
            self._sets.move(busy)

    def begin(self) -> None:
        self._read.clear()


class _TwoVersions:
    """``2bw``: the samples of an update read the version before the newest one that is complete when they begin.

    Group ``g`` reads version ``max(0, g - 1)`` of its stream, whatever the stage. There are two sets:
    what group ``g`` has read is free once it is through, and that is where its update goes, since
    group ``g + 1`` reads the newest.
    """

    def __init__(self, sets: WeightSets, group: int) -> None:
        self._sets, self._size = sets, group
        self.begin()

    def begin(self) -> None:
        self._first, self._turns = -1, 0
        self._before = self._sets.newest, 0

    def read(self, sample: int, version: int) -> tuple[Tensors, int]:
        if self._first < 0:
            self._first = sample
        wanted = max(0, (sample - self._first) // self._size - 1)
        assert wanted in (self._turns, self._turns - 1), f"sample {sample} wants version {wanted} at {self._turns}"
        number, had = self._before if wanted < self._turns else (self._sets.newest, version)
        return self._sets[number], had

    def passed(self, sample: int) -> None: ...

    def updating(self, version: int, changes: bool) -> None:
        self._before, self._turns = (self._sets.newest, version), self._turns + 1
        if changes:
            self._sets.move({self._sets.newest})


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
        gradients: what becomes of those of an update; taken as they are if None.
        mutated: names of the buffers that forwards write to.
        undo: whether a sample that is skipped takes back what it did to them.
        further: where further sets of the weights lie, as :class:`WeightSets` wants it; anywhere if None.
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
        gradients: Gradients | None = None,
        mutated: Collection[str] = (),
        undo: bool = False,
        further: tuple[Callable[[], Tensors], Any] | None = None,
    ) -> None:
        self._stage, self._updates, self._snapshot = stage, updates, snapshot
        self._tensors = tensors
        self._buffers = Buffers(tensors, [name for name in state if name in mutated], undo)
        self.gradients = gradients or Gradients(None, skip=False)
        self._plain = [tensors[name] for name in state]
        self._owned = updates.owned.get(stage, ())
        self._places = [list(state).index(name) for name in self._owned]
        self._trained = [list(state).index(name) for name in trained]
        self.sums = Sums()
        for name in trained:
            self.sums.know(name, tensors[name])
        own = tuple(tensors[name] for name in self._owned)
        self.sets = WeightSets(own) if further is None else WeightSets(own, *further)
        self._policy = _policy(rule, stage, stages, own, self.sets)
        self.version = 0
        self._samples, self._learning = 0, False
        self._marked: dict[int, bool] = {}  #: asked for after a sample -> whether that is through
        self._learns = bool(trained) or bool(self._owned)

    def begin(self) -> None:
        """A stream begins."""
        self._policy.begin()
        self._buffers.begin()
        self._marked.clear()

    def settle(self) -> None:
        """No sample is under way any more: the newest weights are in the model's own memory."""
        self.sets.settle()

    def read(self, sample: int, slip: torch.Tensor) -> tuple[Tensors, Tensors]:
        """All state for the forward of a sample, and what of it has gradients; the version goes onto the slip."""
        weights, version = self._policy.read(sample, self.version)
        slip[1 + self._stage] = version
        special = int(slip[0])
        if special & MARKED:
            self._marked[sample] = False
        self._buffers.forward(sample, marked=bool(special & MARKED), judged=not special & UNJUDGED)
        state = list(self._plain)
        for place, tensor in zip(self._places, weights, strict=True):
            state[place] = tensor
        return tuple(state), tuple(state[place] for place in self._trained)

    def learned(self) -> None:
        """The gradients of one more sample are in ``sums``."""
        self._samples += 1
        self._learning = True

    def passed(self, sample: int, *, judged: bool = True) -> None:
        """A sample needs nothing of this stage any more. ``judged``: unless it was learned from, it was skipped."""
        self._policy.passed(sample)
        self._buffers.passed(sample, learned=self._learning or not judged)
        self._learning = False
        if sample in self._marked:
            self._marked[sample] = True

    def update(self) -> None:
        """Apply the mean of the gradients since the last update, if there are any.

        One that is left out, because they are not finite, counts: versions are the same in all stages.
        """
        self._policy.updating(self.version, self._samples > 0)
        if self._samples:
            if self._owned and self.gradients.ready(self.sums, self._samples, self._stage):
                self._updates.update(self._stage, self.sums)
            self.sets.updated()
            self.version, self._samples = self.version + 1, 0
        for sample in [number for number, passed in self._marked.items() if passed]:
            del self._marked[sample]
            self._snapshot(self._state(sample))

    def _state(self, sample: int) -> dict[str, Any]:
        """A copy of what this stage has learned, with the buffers of the same sample."""
        tensors = {name: self._tensors[name].detach().clone() for name in self._owned}
        learned: dict[str, Any] = {}
        if self._learns:
            learned = {
                "version": self.version,
                "state": deepcopy(self._updates.state()),
                "groups": self._updates.groups(),
            }
        return {"sample": sample, "tensors": {**tensors, **self._buffers.of(sample)}, **learned}


def _policy(rule: Rule, stage: int, stages: int, weights: Tensors, sets: WeightSets) -> _Policy:
    if weights and rule.updates == "2bw" and stages > 1:
        return _TwoVersions(sets, rule.accumulate)
    if not weights or rule.updates == "sync" or not rule.ahead(stage, stages):
        return _Own(weights)
    return _Stash(sets) if rule.updates == "weight_stashing" else _Alias(sets)


__all__ = ["StageWeights"]
