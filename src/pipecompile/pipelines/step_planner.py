"""Plan a training step for one schedule after another: cut, lower, measure the stages, cut again where that helps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pipecompile.errors import InputError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.measure import Measure
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import Program
from pipecompile.ir.training import Gradients, StageCost
from pipecompile.ir.tree import Tree, unflatten
from pipecompile.passes.choose_step import Candidate
from pipecompile.passes.lower_step import LowerStep, owners, weight_users
from pipecompile.passes.measure_step import MeasureStep
from pipecompile.passes.plan_step import PlanStep, step_schedule
from pipecompile.passes.recompute import Recompute
from pipecompile.passes.trace import Traced
from pipecompile.passes.verify_step import VerifyStep
from pipecompile.runtime.criterion import full_precision
from pipecompile.runtime.learn_sets import WeightSets
from pipecompile.runtime.update import OptimizerFactory

#: How far the slowest stage may be from its prediction before the model is cut again.
_TOLERANCE = 0.1


@dataclass
class StepPlanner:
    """Plans, lowers and measures the model for one schedule after another.

    With ``update``, seconds by stage number and the weights a stage owns, every micro-batch makes an
    update, and what counts is the slowest stage: one micro-batch follows the other.
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
    time_limit: float
    copies: float = 2.0
    colocate: Sequence[Sequence[str]] = ()
    update: Callable[[int, int, Sequence[str]], float] | None = None
    _costs: dict[Any, tuple[StageCost, ...]] = field(default_factory=dict[Any, tuple[StageCost, ...]])

    def candidate(self, name: str, profile: Profile) -> Candidate:
        """Cut, measure the stages, and cut again once if the slowest was predicted badly."""
        first = self._attempt(name, profile)
        totals = first.stage_seconds
        predicted = [max(stage.seconds, 1e-9) for stage in first.plan.stages]
        scale = sum(totals) / sum(predicted)
        off = [total / (guess * scale) for total, guess in zip(totals, predicted, strict=True)]
        if len(totals) == 1 or abs(off[totals.index(max(totals))] - 1) <= _TOLERANCE:
            return first
        factors = {i: f for stage, f in zip(first.plan.stages, off, strict=True) for i in stage.layers}
        again = self._attempt(name, profile.scaled(factors))
        return min(first, again, key=lambda c: c.seconds if self.update is None else max(c.stage_seconds))

    def _attempt(self, name: str, profile: Profile) -> Candidate:
        graph = self.traced.graph
        planner = PlanStep(name, self.time_limit, self.micro_batches, self.copies, self.colocate)
        plan = planner.apply(graph, profile, self.cluster)
        order = planner.program(plan, self.micro_batches)
        program = VerifyStep().apply(self.lower.apply(graph, plan, order, self.gradients))
        key = (tuple(stage.layers for stage in plan.stages), step_schedule(name).splits)
        if key not in self._costs:
            self._costs[key] = self.measure_step.apply(
                graph, self.traced.module, self.traced.tensors, self.leaves, plan, program, self.gradients, self.loss,
                self.measure,
            )  # fmt: skip
            if self.update is not None:
                owned, stages = owners(weight_users(graph, plan, self.gradients.weights)), len(plan.stages)
                self._costs[key] = tuple(
                    replace(cost, update=self.update(stage, stages, owned.get(stage, ())))
                    for stage, cost in enumerate(self._costs[key])
                )
        costs = self._costs[key]
        again = self.recompute.apply(order, costs, None if self.lower.to_caller else len(plan.stages) - 1)
        if again is not order:
            program = VerifyStep().apply(self.lower.apply(graph, plan, again, self.gradients))
        found = Candidate(name, plan, program, costs)
        stages = tuple(replace(s, measured=t) for s, t in zip(plan.stages, found.stage_seconds, strict=True))
        return replace(found, plan=replace(plan, stages=stages))


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
            InputError: if it is no scalar tensor.
        """
        if self.targets is not None and self.loss_fn is not None:
            results = [full_precision(o) for o in outputs] if self.full else list(outputs)
            loss = self.loss_fn(unflatten(self.tree, results), self.targets)
            if isinstance(loss, torch.Tensor) and loss.dim() == 0:
                return loss
            raise InputError("loss_fn must return a scalar tensor (reduce it with mean or sum)")
        parts = [o.double().sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
        return torch.stack(parts).sum()


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
