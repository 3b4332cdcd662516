"""compile(mode="learn"): the passes of learning on a stream put together."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipecompile.eager import eager_models
from pipecompile.errors import InputError, PipecompileWarning, PlanError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import ModelGraph, TensorSpec
from pipecompile.ir.learning import Clock, LearnPackage, Rule, TargetSpec, Updates
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.training import Gradients, StageCost
from pipecompile.ir.tree import flatten
from pipecompile.options import Progress, silent
from pipecompile.passes.codegen_learn import CodegenLearn
from pipecompile.passes.custom_operators import imports_of
from pipecompile.passes.lower_learn import LowerLearn
from pipecompile.passes.lower_step import LowerStep, owners, weight_users
from pipecompile.passes.measure_step import MeasureStep
from pipecompile.passes.plan_step import training_profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.passes.recompute import Recompute
from pipecompile.passes.trace import Traced
from pipecompile.passes.trace_step import TraceStep
from pipecompile.passes.verify_learn import VerifyLearn
from pipecompile.pipelines.learning import LearningPipeline
from pipecompile.pipelines.search_time import SearchTime
from pipecompile.pipelines.step_planner import ExampleLoss, StepPlanner, package_of, update_seconds
from pipecompile.pipelines.user_code import check_code
from pipecompile.runtime.learn import LearnOptions, OnNonfinite
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.schedules.learning import learning
from pipecompile.streams.engine import ExecutorName, OnFailure


def compile_learning(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: Cluster,
    *,
    loss_fn: Callable[[Any, Any], Any],
    optimizer: OptimizerFactory,
    updates: Updates = "weight_stashing",
    clock: Clock = "1f1b",
    accumulate: int | None = None,
    example_targets: Any = None,
    on_nonfinite: OnNonfinite = "stop",
    scale_lr: bool = False,
    clip_norm: float | None = None,
    on_failure: OnFailure = "raise",
    snapshot_every: int = 100,
    seed: int = 0,
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    executor: ExecutorName = "process",
    hang_seconds: float | None = None,
    throttle: Mapping[str, Link] | None = None,
    imports: Sequence[str] = (),
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    progress: Progress | None = None,
) -> LearningPipeline:
    """See :func:`pipecompile.compile`; ``args`` and ``kwargs`` are one sample."""
    _check(updates, clock, accumulate, on_nonfinite, on_failure)
    for name, code in (("loss_fn", loss_fn), ("optimizer", optimizer)):
        if code is None:  # type: ignore[reportUnnecessaryComparison]
            raise InputError(
                f"{name}=None: mode='learn' updates with every sample; give for example "
                "loss_fn=torch.nn.CrossEntropyLoss(), optimizer=functools.partial(torch.optim.SGD, lr=0.1)"
            )
    copies = check_code(loss_fn, optimizer, executor)
    if snapshot_every < 1:
        raise InputError(f"snapshot_every={snapshot_every}: it counts samples, 1 or more")
    tell, ahead = progress or silent, 1 if ahead is None else ahead
    leaves, _ = flatten((args, kwargs))
    tell("trace", 0.0)
    with eager_models():
        traced, gradients = TraceStep(tuple(leaf)).trace(model, args, kwargs)
    graph, measure = traced.graph, CpuMeasure()
    tell("profile", 0.3)
    measured = ProfileLayers(profile_seconds).apply(graph, traced.module, traced.tensors, leaves, measure)
    tell("partition", 0.6)
    tied, names = tied_layers(graph, gradients), list(gradients.weights)
    rule = Rule(updates, clock, 1 if accumulate is None else accumulate)

    def update(stage: int, stages: int, names: Sequence[str]) -> float:
        moves = stages > 1 and rule.sets(stage, stages) > 1
        return update_seconds(optimizer, traced, names, moves=moves) / rule.accumulate

    # What a stage computes for a sample is what a training step computes for a micro-batch, and an update.
    chosen = StepPlanner(
        traced,
        gradients,
        leaves,
        ExampleLoss(copy.deepcopy(loss_fn), graph.out_tree, example_targets),
        measure,
        replace(cluster, link=measured.link),
        1,
        LowerStep(ahead),
        Recompute(),
        MeasureStep(profile_seconds / 8),
        SearchTime(time_limit),
        copies,
        list(tied.values()),
        update,
    ).candidate("1f1b", _with_updates(training_profile(graph, measured, gradients), traced, names, update(0, 1, names)))
    plan = _as_measured(chosen.plan, chosen.costs)
    if len(plan.cluster.devices) < len(cluster.devices):
        warnings.warn("; ".join([*plan.notes, *map(_said, tied.items())]), PipecompileWarning, stacklevel=3)
    stages = len(plan.stages)
    if accumulate is None and updates == "2bw" and stages > 1:
        rule = replace(rule, accumulate=rule.ahead(0, stages) + (clock == "1f1b"))
    tell("codegen", 0.9)

    def package(target: TargetSpec | None) -> LearnPackage:
        lowered = LowerLearn(rule, ahead).apply(graph, plan, learning(plan, rule), gradients, target)
        program = VerifyLearn(rule).apply(lowered)
        modules = CodegenLearn(rule).apply(graph, traced.module, plan, program, gradients)
        owned = {stage: tuple(names) for stage, names in owners(weight_users(graph, plan, gradients.weights)).items()}
        whole = replace(package_of(traced, leaves, modules, plan, program), imports=imports_of(traced.module, imports))
        return LearnPackage(whole, rule, owned, target)

    learn = package(None if example_targets is None else target_spec(example_targets))
    tell("done", 1.0)
    return LearningPipeline(
        learn,
        lambda target: package(target_spec(target)),
        traced.tensors,
        model,
        LearnOptions(loss_fn, optimizer, seed, on_nonfinite, scale_lr, clip_norm),
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
        on_failure=on_failure,
        snapshot_every=snapshot_every,
        costs=chosen.costs,
    )


def tied_layers(graph: ModelGraph, gradients: Gradients) -> dict[str, tuple[str, ...]]:
    """The model's name of a trained weight -> the layers that use it, where there are several.

    They share a stage: two stages that update one weight at different times would disagree about it.
    """
    found = {
        entry.fqn: tuple(layer.name for layer in graph.layers if entry.name in layer.state)
        for entry in graph.state
        if entry.name in gradients.weights
    }
    return {name: layers for name, layers in found.items() if len(layers) > 1}


def _with_updates(profile: Profile, traced: Traced, trained: Collection[str], seconds: float) -> Profile:
    """Updates of all weights take so long together; each layer has its share by the size of its own."""
    sizes = [
        sum(
            traced.tensors[name].numel()
            for name in layer.state
            if name in traced.tensors and traced.tensors[name].requires_grad
        )
        for layer in traced.graph.layers
    ]
    each = seconds / max(1, sum(sizes))
    longer = tuple(before + size * each for before, size in zip(profile.seconds, sizes, strict=True))
    return replace(profile, seconds=longer, total=sum(longer))


def _as_measured(plan: Plan, costs: Sequence[StageCost]) -> Plan:
    """With what the stages were measured to take for a sample: forward, backward and update."""
    seconds = [cost.forward + cost.backward + cost.update for cost in costs]
    stages = [replace(stage, measured=each, alone=None) for stage, each in zip(plan.stages, seconds, strict=True)]
    return replace(plan, stages=tuple(stages), total=sum(seconds))


def _said(tied: tuple[str, tuple[str, ...]]) -> str:
    name, layers = tied
    return (
        f"{', '.join(map(repr, layers))} share the weight {name!r}, so they and all between them are in one stage: "
        "give each its own weight to part them"
    )


def target_spec(target: Any) -> TargetSpec:
    """What all targets must be like.

    Raises:
        InputError: if there is no tensor in it.
    """
    leaves, tree = flatten(target)
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise InputError(f"a target must be a tensor or a nest of tensors, got {type(target).__name__}")
    return TargetSpec(tree, tuple(TensorSpec.of(leaf) for leaf in leaves))


def _check(updates: str, clock: str, accumulate: int | None, on_nonfinite: str, on_failure: str) -> None:
    for name, value, choices in (
        ("updates", updates, ("sync", "weight_stashing", "2bw", "stale", "sideways")),
        ("clock", clock, ("1f1b", "lockstep")),
        ("on_nonfinite", on_nonfinite, ("stop", "skip")),
        ("on_failure", on_failure, ("raise", "restart")),
    ):
        if value not in choices:
            raise InputError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}")
    if isinstance(accumulate, bool) or not isinstance(accumulate, (int, type(None))):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"accumulate={accumulate!r}: it counts samples, 1 or more")
    if accumulate is not None and accumulate < 1:
        raise PlanError(f"accumulate={accumulate}: an update takes one sample at least")


__all__ = ["compile_learning", "target_spec"]
