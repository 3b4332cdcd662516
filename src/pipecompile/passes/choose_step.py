"""``schedule="auto"``: simulate what fits, take the fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import PlanError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.training import StageCost, kept_at_once, waiting_at_once
from pipecompile.schedules.recompute import recomputed
from pipecompile.simulate.step import bubble, simulate_step

#: How many candidates a refusal names.
_HANDFUL = 6


@dataclass(frozen=True)
class Candidate:
    """A schedule with the plan made for it, its lowered program and the measured costs of its stages."""

    name: str
    plan: Plan
    program: Program
    costs: tuple[StageCost, ...]

    @property
    def seconds(self) -> float:
        """Simulated length of one step."""
        return self.simulated.finishes[0]

    @property
    def simulated(self) -> Timeline:
        """One step on paper."""
        return simulate_step(self.program, self.costs, self.plan.cluster.link, cluster=self.plan.cluster)

    def slowed(self, longer: Mapping[int, float]) -> Candidate:
        """With the costs of stages as they are beside others.

        ``longer`` is by what factor the work of a device takes longer while all others are busy; they are
        so only outside the schedule's bubble.
        """
        busy = 1 - bubble(self.simulated)
        mean = sum(longer.values()) / len(longer)
        factors = [1 + (longer.get(stage.device, mean) - 1) * busy for stage in self.plan.stages]
        costs = tuple(cost.slowed(factor) for cost, factor in zip(self.costs, factors, strict=True))
        alone = self.stage_seconds
        stages = tuple(replace(stage, alone=took) for stage, took in zip(self.plan.stages, alone, strict=True))
        return replace(self, plan=replace(self.plan, stages=stages)).costing(costs)

    def costing(self, costs: Sequence[StageCost]) -> Candidate:
        """With other costs, which its plan then says too."""
        found = replace(self, costs=tuple(costs))
        measured = zip(self.plan.stages, found.stage_seconds, strict=True)
        stages = tuple(replace(stage, measured=seconds) for stage, seconds in measured)
        return replace(found, plan=replace(self.plan, stages=stages))

    @property
    def stage_seconds(self) -> list[float]:
        """What each stage computes for one micro-batch: forward, perhaps again, backward, and its share of an update."""
        again, m = recomputed(self.program), self.program.micro_batches
        return [
            cost.forward * (1 + (stage in again))
            + (cost.backward_input + cost.backward_weight or cost.backward)
            + cost.update / m
            for stage, cost in enumerate(self.costs)
        ]

    @property
    def memory(self) -> int:
        """The most activations in bytes that one device keeps at a time, those that wait in its rings included."""
        sizes, stashes = [cost.kept for cost in self.costs], [cost.stash for cost in self.costs]
        kept = zip(kept_at_once(self.program, sizes, stashes), waiting_at_once(self.program), strict=True)
        return int(max((own + waiting for own, waiting in kept), default=0.0))


@dataclass(frozen=True)
class ChooseStep:
    """Take the candidate whose simulated step is shortest among those that keep at most ``memory_limit`` bytes."""

    memory_limit: int | None = None

    def fits(self, candidate: Candidate) -> bool:
        """Whether it keeps within the limit."""
        return self.memory_limit is None or candidate.memory <= self.memory_limit

    def apply(self, candidates: Sequence[Candidate]) -> Candidate:
        """The choice.

        Raises:
            PlanError: if none fits; the message says what each would need.
        """
        fitting = [c for c in candidates if self.fits(c)]
        if not fitting:
            raise PlanError(
                f"no schedule keeps its activations within memory_limit={self.memory_limit:,} bytes a device; they "
                f"need: {_needs(candidates)}. Use more micro-batches or devices, recompute='auto', or a higher limit"
            )
        return min(fitting, key=lambda c: (c.seconds, c.memory))


def _needs(candidates: Sequence[Candidate]) -> str:
    """What the most modest candidates keep, a handful of them; with their micro-batches where numbers differ."""
    several = len({candidate.program.micro_batches for candidate in candidates}) > 1
    needs = dict[str, int]()
    for candidate in sorted(candidates, key=lambda c: c.memory):
        count = candidate.program.micro_batches
        parts = f" ({count} micro-batch{'es' if count > 1 else ''})" if several else ""
        needs.setdefault(candidate.name + parts, candidate.memory)
    first = [f"{name} {needed:,}" for name, needed in needs.items()][:_HANDFUL]
    more = len(needs) - len(first)
    return ", ".join(first) + (f", {more} others more" if more else "")


__all__ = ["Candidate", "ChooseStep"]
