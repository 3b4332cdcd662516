"""Choose the stages that compute their forward twice instead of keeping activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from pipecompile.errors import PlanError
from pipecompile.ir.program import Program
from pipecompile.ir.training import StageCost, kept_at_once
from pipecompile.schedules.recompute import RecomputeName, recompute


@dataclass(frozen=True)
class Recompute:
    """Activation recomputation in ``"none"`` of the stages, in every ``"stage"``, or ``"auto"``.

    ``auto`` takes, device by device, the stages whose second forward is shortest among those that
    bring the device below ``memory_limit`` bytes; all of a device where nothing does.

    Raises:
        PlanError: for another mode, or ``auto`` without a limit.
    """

    mode: RecomputeName = "none"
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("none", "stage", "auto"):
            raise PlanError(f"recompute={self.mode!r}: choose 'none', 'stage' or 'auto'")
        if self.mode == "auto" and self.memory_limit is None:
            raise PlanError("recompute='auto' recomputes as little as memory_limit= allows: give that too")

    def apply(self, program: Program, costs: Sequence[StageCost], loss: int | None) -> Program:
        """The compute-only program, the very same where nothing is recomputed; ``loss`` is the stage with the loss."""
        stages = [stage for device in program.devices for stage in device.stages]
        if self.mode == "auto":
            stages = [stage for device in range(len(program.devices)) for stage in self._least(program, device, costs, loss)]
        return recompute(program, stages, loss) if stages and self.mode != "none" else program

    def _least(self, program: Program, device: int, costs: Sequence[StageCost], loss: int | None) -> tuple[int, ...]:
        alone = replace(program, devices=(program.devices[device],))
        own = alone.devices[0].stages
        sizes, stashes = [cost.kept for cost in costs], [cost.stash for cost in costs]

        def seconds(stages: Sequence[int]) -> float:
            return sum(costs[stage].forward for stage in stages if stage != loss)

        choices = [found for count in range(len(own) + 1) for found in combinations(own, count)]
        for found in sorted(choices, key=lambda found: (seconds(found), len(found))):
            (peak,) = kept_at_once(recompute(alone, found, loss), sizes, stashes)
            if self.memory_limit is not None and peak <= self.memory_limit:
                return found
        return own


__all__ = ["Recompute"]
