"""Refine: time each finished stage, cut again where the prediction was off, and see what stages cost each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from pipecompile.errors import PipecompileError
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.measure import Job, Measure
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import Program
from pipecompile.passes.codegen import Codegen, stage_state
from pipecompile.passes.emit import HEADER, Emitter
from pipecompile.passes.observe import copies
from pipecompile.passes.partition import calibrate
from pipecompile.passes.profile import state_for_timing, whole_model


@dataclass(frozen=True)
class Refine:
    """Correct a plan by measurement.

    The plan is cut again, at most ``rounds`` times, while the slowest stage takes more than
    ``tolerance`` longer or shorter than predicted; the best balanced plan wins. Layer times are
    calibrated by all stages timed so far, of every cut tried. ``budget`` is the time in seconds for
    timing one stage. The whole model is timed in turns with the stages and all comparisons are
    relative to it, so that a machine that changes its speed moves no cut. Stages are timed on the
    device the profile was taken on; on one of another speed they are taken to need that much longer.
    With ``beside``, the stages of the plan kept also run all at once, and what they slow each other
    down by is part of their measured times.
    """

    tolerance: float = 0.10
    rounds: int = 3
    budget: float = 0.5
    beside: bool = False

    def apply(
        self,
        graph: ModelGraph,
        module: fx.GraphModule,
        tensors: Mapping[str, torch.Tensor],
        leaves: Sequence[Any],
        profile: Profile,
        partition: Callable[[Profile], Plan],
        lower: Callable[[Plan], Program],
        measure: Measure,
    ) -> Plan:
        """The best measured plan among ``partition(profile)`` and its corrections."""
        plans: list[Plan] = []
        timed: list[tuple[tuple[int, ...], float]] = []
        known = profile
        seen: set[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = set()
        for _ in range(self.rounds):
            plan = partition(known)
            cut = tuple((stage.layers, stage.devices) for stage in plan.stages)
            if cut in seen:
                break
            seen.add(cut)
            jobs = self._jobs(graph, module, tensors, leaves, plan, lower(plan))
            total, *times = measure.functions([whole_model(graph, module, tensors, leaves), *jobs], self.budget)
            speeds = [min(plan.cluster.devices[d].speed for d in s.devices) for s in plan.stages]
            stages = tuple(replace(s, measured=t / v) for s, t, v in zip(plan.stages, times, speeds, strict=True))
            plans.append(replace(plan, stages=stages, total=total))
            drift = total / profile.total if profile.total else 1.0
            predicted = max((s.seconds + s.transfer) / len(s.devices) for s in stages) * drift
            if len(stages) == 1 or abs(plans[-1].slowest / predicted - 1) <= self.tolerance:
                break
            timed += [(stage.layers, took / drift) for stage, took in zip(stages, times, strict=True)]
            known = calibrate(profile, timed)
        best = max(plans, key=lambda p: p.balance)
        if len(plans) > 1:
            note = f"cut {len(plans)} times by timing the finished stages: balance {plans[0].balance:.3f} at first, "
            best = replace(best, notes=(*best.notes, note + f"{best.balance:.3f} in the plan kept"))
        if self.beside and len(best.loads) > 1:
            jobs = self._jobs(graph, module, tensors, leaves, best, lower(best))
            try:
                best = self._side_by_side(best, jobs, measure)
            except PipecompileError as error:
                best = replace(best, notes=(*best.notes, f"stages were timed alone only, not side by side: {error}"))
        return best

    def _side_by_side(self, plan: Plan, jobs: Sequence[Job], measure: Measure) -> Plan:
        """The plan with its stages' times as they are while the others compute.

        Measured is what stages that never pause cost each other. In a pipeline a stage waits for the
        slowest, and is in nobody's way meanwhile.
        """
        placed = [(stage, device) for stage in plan.stages for device in stage.devices]
        cores = {device: plan.cluster.devices[device].core for _, device in placed}
        factors = measure.slowdowns(
            [jobs[stage.index] for stage, _ in placed], [cores[device] for _, device in placed], self.budget
        )
        loads: defaultdict[Any, float] = defaultdict(float)
        for device, load in plan.loads.items():
            loads[_place(device, cores)] += load
        period = max(loads.values())
        stages: list[Stage] = []
        for stage in plan.stages:
            alone = stage.seconds if stage.measured is None else stage.measured
            longer: list[float] = []
            for (other, device), factor in zip(placed, factors, strict=True):
                if other is stage:
                    # How much of the time the other cores compute.
                    busy = [load / period for place, load in loads.items() if place != _place(device, cores)]
                    longer.append(1 + (factor - 1) * (sum(busy) / len(busy) if busy and period else 0.0))
            stages.append(replace(stage, alone=alone, measured=alone * sum(longer) / len(longer)))
        return replace(plan, stages=tuple(stages))

    def _jobs(
        self,
        graph: ModelGraph,
        module: fx.GraphModule,
        tensors: Mapping[str, torch.Tensor],
        leaves: Sequence[Any],
        plan: Plan,
        program: Program,
    ) -> list[Job]:
        """Every stage function with real values to call it with."""
        values: dict[str, Any] = dict(zip(graph.inputs, copies(leaves), strict=True))
        jobs: list[Job] = []
        for stage in plan.stages:
            reads = list(dict.fromkeys(v for e in program.edges if e.target == stage.index for v in e.values))
            makes = list(dict.fromkeys(v for e in program.edges if e.source == stage.index for v in e.values))
            emit = Emitter(graph, module)
            layers = [graph.layers[i] for i in stage.layers]
            names = stage_state(emit, layers, makes)
            text = Codegen().stage_function(emit, "stage", layers, names, reads, makes)
            source = "\n\n".join([HEADER, *emit.functions.values(), text])
            arguments = [*state_for_timing(graph, tensors, names), *(values[v] for v in reads)]
            jobs.append(Job(source, "stage", arguments))
            namespace: dict[str, Any] = {}
            exec(compile(source, "<stage>", "exec"), namespace)
            with torch.no_grad():
                values.update(zip(makes, namespace["stage"](*copies(arguments)), strict=True))
        return jobs


def _place(device: int, cores: Mapping[int, int | None]) -> tuple[str, int]:
    """The core a device shares with others, or itself where it has none."""
    core = cores[device]
    return ("device", device) if core is None else ("core", core)
