"""What learning on a stream adds to a compiled model: the rule of its updates, who updates what, and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.package import Package
from pipecompile.ir.tree import Tree

#: Which weights a backward sees; see docs/learning.md.
Updates = Literal["sync", "weight_stashing", "2bw", "stale", "sideways"]

#: How far a stage runs ahead of its backward.
Clock = Literal["1f1b", "lockstep"]

#: Rides along with each sample from stage to stage: what is special about it (:data:`MARKED`,
#: :data:`UNJUDGED`), then the number of updates that the weights read by each stage's forward had had.
SLIP = ":slip"

#: A snapshot is to be taken after this sample. This sample has no target, and so no loss that could be not finite.
MARKED, UNJUDGED = 1, 2

#: What became of a sample in the last stage: see :class:`Verdict`, then its loss.
VERDICT = ":verdict"

#: What comes back of a sample: no target, learned from, or not because its loss was not finite.
PREDICTED, LEARNED, SKIPPED = 0, 1, 2


@dataclass(frozen=True)
class Rule:
    """How a stream is learned from. ``accumulate`` samples make one update."""

    updates: Updates = "weight_stashing"
    clock: Clock = "1f1b"
    accumulate: int = 1

    def ahead(self, stage: int, stages: int) -> int:
        """How many forwards a stage is ahead of its backward: S - 1 - s, or twice that in lockstep.

        So many updates lie between the weights that a forward reads and those its backward updates.
        Under ``sync`` a stage runs ahead only within the samples of one update.
        """
        distance = stages - 1 - stage
        if self.updates == "sync":
            return min(distance, self.accumulate - 1)
        return distance if self.clock == "1f1b" else 2 * distance

    def delay(self, stage: int, stages: int) -> int:
        """The most updates between the weights a sample's gradient is taken at and those it is applied to."""
        if self.updates == "sync" or stages == 1:
            return 0
        return 1 if self.updates == "2bw" else -(-self.ahead(stage, stages) // self.accumulate)

    def sets(self, stage: int, stages: int) -> int:
        """The most versions of its weights that a stage keeps at once, the newest among them."""
        return 1 + self.delay(stage, stages) if self.updates in ("weight_stashing", "2bw") else 1

    def version(self, sample: int, stage: int, stages: int) -> int:
        """How many updates the weights have had that the forward of a sample reads, if each sample has a target."""
        group = sample // self.accumulate
        if self.updates == "2bw" and stages > 1:
            return max(0, group - 1)
        if self.updates == "sync":
            return group
        return max(0, sample - self.ahead(stage, stages)) // self.accumulate


@dataclass(frozen=True)
class TargetSpec:
    """Shape, dtype and nest of a target."""

    tree: Tree
    leaves: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class LearnPackage:
    """A model compiled for learning on a stream.

    ``owned`` maps a stage to the placeholder names of the weights it updates. Without ``target`` the
    shape of targets is yet unknown, and the package runs without.
    """

    package: Package
    rule: Rule
    owned: Mapping[int, tuple[str, ...]]
    target: TargetSpec | None = None

    @property
    def stages(self) -> int:
        """How many."""
        return len(self.package.plan.stages)


@dataclass(frozen=True)
class LearnTimes:
    """When a sample entered the first stage and when its result was taken, in ``time.monotonic()`` seconds."""

    entered: float
    left: float

    @property
    def latency(self) -> float:
        """Seconds inside the pipeline."""
        return self.left - self.entered


@dataclass(frozen=True)
class Learned:
    """What comes back of one sample.

    Attributes:
        seq: its number since the pipeline was made; every sample of a source has one.
        output: the model's result.
        loss: its loss, before the update it gave; None for a sample without a target.
        versions: per stage, how many updates the weights had had that its forward read.
        times: when it entered and left.
        skipped: whether it made no update because its loss was not finite.
    """

    seq: int
    output: Any
    loss: float | None
    versions: tuple[int, ...]
    times: LearnTimes
    skipped: bool = False


@dataclass(frozen=True)
class Outcome:
    """A result as an executor gives it: flat outputs, and the rest as in :class:`Learned`."""

    outputs: Sequence[Any]
    status: int
    loss: float
    versions: tuple[int, ...]
    times: LearnTimes


__all__ = [
    "LEARNED",
    "MARKED",
    "PREDICTED",
    "SKIPPED",
    "SLIP",
    "UNJUDGED",
    "VERDICT",
    "Clock",
    "LearnPackage",
    "LearnTimes",
    "Learned",
    "Outcome",
    "Rule",
    "TargetSpec",
    "Updates",
]
