"""compile(mode="train"): the passes of a training step put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError, PipecompileWarning
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.training import StepPackage
from pipecompile.ir.tree import Tree, flatten, unflatten
from pipecompile.passes.codegen_step import CodegenStep
from pipecompile.passes.lower_step import LowerStep, owners, weight_users
from pipecompile.passes.plan_step import PlanStep, training_profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.passes.trace import Traced
from pipecompile.passes.trace_step import TraceStep
from pipecompile.passes.verify_step import VerifyStep
from pipecompile.runtime.batches import Reduction, batched_inputs, split_inputs
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.training import ExecutorName, TrainingPipeline


def compile_training(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: Cluster,
    *,
    loss_fn: Callable[[Any, Any], Any],
    optimizer: OptimizerFactory,
    schedule: str = "1f1b",
    micro_batches: int = 4,
    reduction: Reduction = "auto",
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int = 1,
    seed: int = 0,
    clip_norm: float | None = None,
    keep_gradients: bool = False,
    executor: ExecutorName = "process",
    hang_seconds: float | None = None,
    throttle: Mapping[str, Link] | None = None,
    imports: Sequence[str] = (),
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    tell: Callable[[str, float], None] = lambda _phase, _fraction: None,
) -> TrainingPipeline:
    """See :func:`pipecompile.compile`; ``args`` and ``kwargs`` are one whole batch."""
    leaves, tree = flatten((args, kwargs))
    batch, batched = batched_inputs(leaves)
    if not 1 <= micro_batches <= batch:
        raise InputError(f"micro_batches={micro_batches}: a batch of {batch} samples has 1 to {batch} micro-batches")
    first = split_inputs(leaves, batched, micro_batches)[0]
    part_args, part_kwargs = unflatten(tree, first)
    dynamic = _batch_dims(tree, batched) if batch % micro_batches else None
    tell("trace", 0.0)
    traced, gradients = TraceStep(tuple(leaf), dynamic).trace(model, part_args, part_kwargs)
    tell("profile", 0.3)
    graph = traced.graph
    measured = ProfileLayers(profile_seconds).apply(graph, traced.module, traced.tensors, first, CpuMeasure())
    profile = training_profile(graph, measured, gradients)
    tell("partition", 0.6)
    planner = PlanStep(schedule, time_limit)
    plan = planner.apply(graph, profile, replace(cluster, link=measured.link))
    if len(plan.cluster.devices) < len(cluster.devices):
        warnings.warn("; ".join(plan.notes), PipecompileWarning, stacklevel=3)
    order = planner.program(plan, micro_batches)
    program = VerifyStep().apply(LowerStep(ahead).apply(graph, plan, order, gradients))
    tell("codegen", 0.9)
    modules = CodegenStep().apply(graph, traced.module, plan, program, gradients)
    owned = {stage: tuple(names) for stage, names in owners(weight_users(graph, plan, gradients.weights)).items()}
    package = replace(_package(traced, first, modules, plan, program), imports=tuple(imports))
    step = StepPackage(package, owned, batched)
    tell("done", 1.0)
    return TrainingPipeline(
        step,
        traced.tensors,
        model,
        loss_fn,
        optimizer,
        reduction=reduction,
        seed=seed,
        clip_norm=clip_norm,
        keep_gradients=keep_gradients,
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
    )


def _package(
    traced: Traced, leaves: list[Any], modules: tuple[DeviceModule, ...], plan: Plan, program: Program
) -> Package:
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


def _batch_dims(tree: Tree, batched: Sequence[bool]) -> list[Any]:
    """``dynamic_shapes`` that lets dimension 0 of the batched tensors differ from call to call."""
    flags = iter(batched)

    def spread(node: Tree) -> Any:
        if node.kind == "leaf":
            return {0: torch.export.Dim.AUTO} if next(flags) else None
        inner = [spread(child) for child in node.children]
        return dict(zip(node.keys, inner, strict=True)) if node.keys else inner

    args, kwargs = tree.children
    return [spread(child) for child in (*args.children, *kwargs.children)]
