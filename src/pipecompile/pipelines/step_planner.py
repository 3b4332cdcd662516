"""Plan a training step for one schedule after another: cut, lower, measure the stages, cut again where that helps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipecompile.errors import InputError, PipecompileError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.measure import Measure
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import COMPUTE, Program
from pipecompile.ir.training import Gradients
from pipecompile.ir.tree import Tree, unflatten
from pipecompile.passes.choose_step import Candidate
from pipecompile.passes.lower_step import LowerStep, owners, weight_users
from pipecompile.passes.measure_step import MeasuredStep, MeasureStep
from pipecompile.passes.plan_step import PlanStep, step_schedule
from pipecompile.passes.recompute import Recompute
from pipecompile.passes.trace import Traced
from pipecompile.passes.verify_step import VerifyStep
from pipecompile.pipelines.search_time import SearchTime
from pipecompile.runtime.criterion import full_precision
from pipecompile.runtime.learn_sets import WeightSets
from pipecompile.runtime.step_trial import total
from pipecompile.runtime.update import OptimizerFactory

#: How far the slowest stage may be from its prediction before the model is cut again.
_TOLERANCE = 0.1


@dataclass
class StepPlanner:
    """Plans, lowers and measures the model for one schedule after another.

    With ``update``, seconds by stage number and the weights a stage owns, every micro-batch makes an
    update, and what counts is the slowest stage: one micro-batch follows the other. ``measured`` is what is
    known of stages already; planners of the same micro-batches may share it.
    """

    traced: Traced
    gradients: Gradients
    leaves: list[Any]
    loss: Callable[[Sequence[Any]], torch.Tensor]
    measure: Measure
    cluster: Cluster
    micro_batches: int
    lower: LowerStep
    recompute: Recompute
    measure_step: MeasureStep
    search: SearchTime
    copies: float = 2.0
    colocate: Sequence[Sequence[str]] = ()
    update: Callable[[int, int, Sequence[str]], float] | None = None
    measured: dict[Any, MeasuredStep] = field(default_factory=dict[Any, MeasuredStep])

    def candidate(self, name: str, profile: Profile) -> Candidate:
        """Cut, measure the stages, and cut again once if the slowest was predicted badly."""
        seconds = self.search.share()
        first = self._attempt(name, profile, seconds)
        totals = first.stage_seconds
        predicted = [max(stage.seconds, 1e-9) for stage in first.plan.stages]
        scale = sum(totals) / sum(predicted)
        off = [total / (guess * scale) for total, guess in zip(totals, predicted, strict=True)]
        if len(totals) == 1 or abs(off[totals.index(max(totals))] - 1) <= _TOLERANCE:
            return first
        factors = {i: f for stage, f in zip(first.plan.stages, off, strict=True) for i in stage.layers}
        again = self._attempt(name, profile.scaled(factors), seconds)
        return min(first, again, key=lambda c: c.seconds if self.update is None else max(c.stage_seconds))

    def work(self, profile: Profile) -> float:
        """Seconds of all passes of a whole batch, updates not counted, where one device does everything."""
        one = replace(self.cluster.devices[0], memory=None)  # it need not fit: it is only timed
        alone = replace(self, cluster=replace(self.cluster, devices=(one,)), recompute=Recompute())
        return alone.candidate("gpipe", profile).stage_seconds[0] * self.micro_batches

    def beside(self, found: Sequence[Candidate], budget: float) -> list[Candidate]:
        """The candidates with the costs of their stages as they are while the other devices compute.

        Stages were timed alone. How much longer all that a device does for a micro-batch takes while the
        others do theirs is measured once, for about ``budget`` seconds a device, with the plan of the fastest.
        """
        several = [candidate for candidate in found if len(candidate.plan.cluster.devices) > 1]
        if not several:
            return list(found)
        fastest = min(several, key=lambda candidate: candidate.seconds)
        devices = fastest.plan.cluster.devices
        turns = self.measured[_key(fastest.name, fastest.plan)].turns * fastest.plan.data_parallel
        cores = [devices[device.device].core for device in fastest.program.devices]
        try:
            factors = self.measure.slowdowns(turns, cores, budget)
        except (PipecompileError, OSError) as error:
            note = f"stages were timed alone only, not side by side: {error}"
            return [replace(c, plan=replace(c.plan, notes=(*c.plan.notes, note))) for c in found]
        longer = {device.device: factor for device, factor in zip(fastest.program.devices, factors, strict=True)}
        return [c.slowed(longer) if len(c.plan.cluster.devices) > 1 else c for c in found]

    def repeated(self, found: Candidate, data_parallel: int, cluster: Cluster) -> Candidate:
        """So many pipelines like a candidate's, on the devices of ``cluster``."""
        if data_parallel == 1:
            return found
        plan = found.plan.repeated(data_parallel, cluster)
        computing = (
            replace(device, warm_up=tuple(step for step in device.warm_up if step.op in COMPUTE))
            for device in found.program.devices
        )
        order = replace(found.program, devices=tuple(computing), edges=())
        program = VerifyStep().apply(self.lower.apply(self.traced.graph, plan, order, self.gradients))
        return replace(found, plan=plan, program=program, costs=found.costs * data_parallel)

    def with_updates(self, found: Candidate, seconds: Callable[[tuple[str, ...]], float]) -> Candidate:
        """The candidate with what the update of each stage's own weights takes."""
        owned = owners(weight_users(self.traced.graph, found.plan, self.gradients.weights))
        updates = [seconds(tuple(owned.get(s, ()))) for s in range(len(found.costs))]
        return found.costing([replace(cost, update=t) for cost, t in zip(found.costs, updates, strict=True)])

    def _attempt(self, name: str, profile: Profile, seconds: float) -> Candidate:
        graph = self.traced.graph
        planner = PlanStep(name, seconds, self.micro_batches, self.copies, self.colocate)
        with self.search.running():
            plan = planner.apply(graph, profile, self.cluster)
        order = planner.program(plan, self.micro_batches)
        program = VerifyStep().apply(self.lower.apply(graph, plan, order, self.gradients))
        if (key := _key(name, plan)) not in self.measured:
            measured = self.measure_step.apply(
                graph, self.traced.module, self.traced.tensors, self.leaves, plan, program, self.gradients, self.loss,
                self.measure,
            )  # fmt: skip
            if self.update is not None:
                owned, stages = owners(weight_users(graph, plan, self.gradients.weights)), len(plan.stages)
                costs = tuple(
                    replace(cost, update=self.update(stage, stages, owned.get(stage, ())))
                    for stage, cost in enumerate(measured.costs)
                )
                measured = replace(measured, costs=costs)
            self.measured[key] = measured
        costs = self.measured[key].costs
        again = self.recompute.apply(order, costs, None if self.lower.to_caller else len(plan.stages) - 1)
        if again is not order:
            program = VerifyStep().apply(self.lower.apply(graph, plan, again, self.gradients))
        return Candidate(name, plan, program, costs).costing(costs)


def _key(name: str, plan: Plan) -> Any:
    """What plans have in common for which one measurement of the stages holds."""
    return tuple(stage.layers for stage in plan.pipeline), step_schedule(name).splits


@dataclass(frozen=True)
class ExampleLoss:
    """The loss on flat results, to measure the last stage with: without targets, a sum that has gradients."""

    loss_fn: Callable[[Any, Any], Any] | None
    tree: Tree
    targets: Any
    full: bool = False

    def __call__(self, outputs: Sequence[Any]) -> torch.Tensor:
        """The loss of the example.

        Raises:
            InputError: if it raises, or is no scalar tensor.
        """
        if self.targets is not None and self.loss_fn is not None:
            results = [full_precision(o) for o in outputs] if self.full else list(outputs)
            try:
                loss = self.loss_fn(unflatten(self.tree, results), self.targets)
            except Exception as error:  # user code may raise anything
                raise InputError(
                    f"loss_fn raises on the model's result and example_targets: {type(error).__name__}: {error}"
                ) from error
            if isinstance(loss, torch.Tensor) and loss.dim() == 0:
                return loss
            raise InputError("loss_fn must return a scalar tensor (reduce it with mean or sum)")
        return total(outputs)


def update_seconds(
    factory: OptimizerFactory | None, traced: Traced, names: Sequence[str], *, moves: bool = False
) -> float:
    """Median seconds of an update of copies of these weights, which ``moves`` them to other memory first."""
    weights = [torch.nn.Parameter(traced.tensors[name].detach().clone()) for name in names]
    if not weights or factory is None:
        return 0.0
    optimizer, times = factory(weights), list[float]()
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    sets = WeightSets(tuple(weights))
    for _ in range(5):
        begin = time.perf_counter()
        if moves:
            sets.move({sets.newest})
        optimizer.step()
        if weights[0].is_cuda:
            torch.cuda.synchronize(weights[0].device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def package_of(
    traced: Traced, leaves: list[Any], modules: tuple[DeviceModule, ...], plan: Plan, program: Program
) -> Package:
    """What a runtime needs to know of a traced model cut by ``plan``; ``leaves`` are the example."""
    graph = traced.graph
    specs = [graph.values.get(name) or TensorSpec.of(leaf) for name, leaf in zip(graph.inputs, leaves, strict=True)]
    return Package(
        graph.name,
        modules,
        plan,
        program,
        graph.state,
        tuple(specs),
        graph.inputs,
        graph.outputs,
        graph.in_tree,
        graph.out_tree,
        graph.symbols,
        traced.parameters,
    )


__all__ = ["ExampleLoss", "StepPlanner", "package_of", "update_seconds"]
