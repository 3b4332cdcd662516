"""compile(mode="train"): the passes of a training step put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from pipecompile.eager import eager_models
from pipecompile.errors import InputError, PipecompileWarning, PlanError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.profile import Profile
from pipecompile.ir.training import StepPackage
from pipecompile.ir.tree import Tree, flatten, unflatten
from pipecompile.options import Progress, silent
from pipecompile.passes.choose_step import Candidate, ChooseStep
from pipecompile.passes.codegen_step import CodegenStep
from pipecompile.passes.lower_step import LowerStep, owners, weight_users
from pipecompile.passes.measure_step import MeasureStep
from pipecompile.passes.part_counts import best_way, part_counts
from pipecompile.passes.plan_step import training_profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.passes.recompute import Recompute
from pipecompile.passes.smaller_batches import SmallerBatches
from pipecompile.passes.trace_step import TraceStep
from pipecompile.pipelines.drop_in import FILL_AND_DRAIN
from pipecompile.pipelines.param_groups import Groups, ModelGroups
from pipecompile.pipelines.search_time import SearchTime
from pipecompile.pipelines.step_planner import ExampleLoss, StepPlanner, package_of, update_seconds
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.runtime.batches import Reduction, batched_inputs, option, split_inputs, split_targets
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.update import OptimizerFactory, copies_kept
from pipecompile.schedules.recompute import RecomputeName
from pipecompile.schedules.training import STEP_SCHEDULES, ScheduleName
from pipecompile.streams.engine import ExecutorName


def compile_training(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: Cluster,
    *,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    param_groups: Groups | None = None,
    schedule: ScheduleName = "auto",
    micro_batches: int | Literal["auto"] = 4,
    dynamic_batch: bool = False,
    autocast: torch.dtype | None = None,
    reduction: Reduction = "auto",
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    seed: int = 0,
    clip_norm: float | None = None,
    memory_limit: int | None = None,
    recompute: RecomputeName = "none",
    deferred_batch_norm: bool = False,
    example_targets: Any = None,
    keep_gradients: bool = False,
    check_finite: bool = False,
    executor: ExecutorName = "process",
    hang_seconds: float | None = None,
    throttle: Mapping[str, Link] | None = None,
    threads: int = 1,
    imports: Sequence[str] = (),
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    progress: Progress | None = None,
) -> TrainingPipeline:
    """See :func:`pipecompile.compile`; ``args`` and ``kwargs`` are one whole batch.

    Where everything is to be chosen, one worker with ``threads`` threads and the batch whole stands for choice too.
    """
    tell = progress or silent
    drop_in = loss_fn is None
    names = _schedules(schedule, drop_in, optimizer, clip_norm, check_finite or keep_gradients)
    if param_groups is not None and optimizer is None:
        raise InputError("param_groups= is for the pipeline's own optimizer: give optimizer= as well")
    groups = None if param_groups is None else ModelGroups.of(model, param_groups)
    copies = weight_copies(optimizer)
    if loss_fn is not None and reduction == "auto" and option(loss_fn, "reduction", None) is None:
        warnings.warn(
            "loss_fn does not say how it is reduced: taken as a mean over the samples of a micro-batch. If it is a "
            "sum, or leaves out targets, give reduction='sum', or a function of a target that says how much of it "
            "counts; reduction='mean' says that this is right",
            PipecompileWarning,
            stacklevel=3,
        )
    leaves, tree = flatten((args, kwargs))
    batch, batched = batched_inputs(leaves)
    counts = part_counts(batch, len(cluster.devices)) if micro_batches == "auto" else [micro_batches]
    if not all(1 <= count <= batch for count in counts):
        raise InputError(f"micro_batches={micro_batches}: a batch of {batch} samples has 1 to {batch} micro-batches")
    ways = [_Way(cluster, count) for count in counts]
    if "auto" == schedule == micro_batches and threads > 1 and executor == "process" and not throttle:
        memory = min((d.memory for d in cluster.devices if d.memory is not None), default=None)
        whole = Cluster((Device("cpu", threads=threads, memory=memory),), cluster.link)
        ways = [_Way(whole, count) for count in ([1] if memory_limit is None else [1, *counts])] + ways
    half, choose = _autocast(autocast), ChooseStep(memory_limit)
    dtype = None if autocast is None else str(autocast).removeprefix("torch.")
    planners: dict[tuple[int, int], StepPlanner] = {}
    search = SearchTime(time_limit, len(ways) * len(names))

    @cache
    def planned(index: int) -> tuple[StepPlanner, Profile, Callable[[tuple[str, ...]], float]]:
        """What plans for one number of micro-batches on one choice of devices, its profile, seconds of updates."""
        way, part, at = ways[index], 1 / len(ways), 0.9 * index / len(ways)
        count, width = way.micro_batches, way.cluster.devices[0].threads
        measure = CpuMeasure(threads=width, imports=imports)
        first = split_inputs(leaves, batched, count)[0]
        part_args, part_kwargs = unflatten(tree, first)
        several = (dynamic_batch or batch % count > 0) and batch > count
        dynamic = _batch_dims(tree, batched) if several else None
        smaller = (
            SmallerBatches(batched, min(batch // count, 2) if dynamic_batch else batch // count) if several else None
        )
        tell("trace", at)
        with eager_models(), half:
            traced, gradients = TraceStep(tuple(leaf), dynamic, smaller).trace(model, part_args, part_kwargs)
        tell("profile", at + 0.3 * part)
        with half:
            measured = ProfileLayers(profile_seconds).apply(traced.graph, traced.module, traced.tensors, first, measure)
        loss = ExampleLoss(loss_fn, traced.graph.out_tree, _part(example_targets, batch, count), autocast is not None)
        planners[count, width] = planner = StepPlanner(
            traced,
            gradients,
            first,
            loss,
            measure,
            replace(way.cluster, link=measured.link),
            count,
            LowerStep(1 if ahead is None else ahead, drop_in, early=clip_norm is None and not check_finite),
            Recompute(recompute, memory_limit),
            MeasureStep(profile_seconds / 8, deferred_batch_norm, dtype),
            search,
            copies,
        )

        @cache
        def update(weights: tuple[str, ...]) -> float:
            with stage_mode(width):
                return update_seconds(optimizer, traced, weights)

        tell("partition", at + 0.6 * part)
        return planner, training_profile(traced.graph, measured, gradients, again=recompute == "stage"), update

    def least(index: int) -> float:
        """What no schedule of a way can be far below."""
        planner, profile, _ = planned(index)
        return planner.work(profile) / len(planner.cluster.devices)

    def tried(index: int) -> list[Candidate]:
        """The candidates of a way."""
        planner, profile, update = planned(index)
        few, alone = len(planner.traced.graph.layers), len(planner.cluster.devices) == 1 and schedule == "auto"
        fitting = [name for name in names if schedule != "auto" or STEP_SCHEDULES[name].chunks <= few]
        found, errors = list[Candidate](), list[PlanError]()
        for name in ["gpipe"] if alone else fitting:
            try:
                found.append(planner.with_updates(planner.candidate(name, profile), update))
            except PlanError as error:  # one with more stages a device may not fit where another does
                errors.append(error)
        if not found:
            raise errors[0]
        return found if executor == "inline" else planner.beside(found, profile_seconds / 8)

    chosen, notes = best_way([way.name for way in ways], least, tried, choose)
    plan, program = chosen.plan, chosen.program
    planner = planners[program.micro_batches, plan.cluster.devices[0].threads]
    if len(plan.cluster.devices) < len(planner.cluster.devices):
        warnings.warn("; ".join(plan.notes), PipecompileWarning, stacklevel=3)
    plan = replace(plan, notes=(*plan.notes, *notes))
    traced, gradients, first, graph = planner.traced, planner.gradients, planner.leaves, planner.traced.graph
    tell("codegen", 0.9)
    smaller = dynamic_batch or batch % planner.micro_batches > 0
    modules = CodegenStep(deferred=deferred_batch_norm, autocast=dtype, fewer=smaller).apply(
        graph, traced.module, plan, program, gradients
    )
    owned = {stage: tuple(names) for stage, names in owners(weight_users(graph, plan, gradients.weights)).items()}
    package = replace(package_of(traced, first, modules, plan, program), imports=tuple(imports))
    step = StepPackage(package, owned, batched, batch, smaller)
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
        check_finite=check_finite,
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
        groups=groups,
        full_loss=autocast is not None,
        costs=chosen.costs,
    )


class _Way(NamedTuple):
    """The devices, and the number of micro-batches."""

    cluster: Cluster
    micro_batches: int

    @property
    def name(self) -> str:
        threads = self.cluster.devices[0].threads
        return f"{self.micro_batches}" if threads == 1 else f"{self.micro_batches} in one worker with {threads} threads"


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Torch's autocast for tracing and timing, without its cache: what that holds of a run without gradients has none.

    Raises:
        InputError: for a dtype whose gradients need more than that.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"autocast={dtype!r} is no dtype of torch: write autocast=torch.bfloat16")
    if dtype not in (None, torch.bfloat16):
        raise InputError(
            f"autocast={dtype!r}: only torch.bfloat16 is possible; gradients in float16 vanish unless the loss is "
            "scaled, which is not done here"
        )
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype else nullcontext()


def _part(targets: Any, batch: int, parts: int) -> Any:
    return None if targets is None else split_targets(targets, batch, parts)[0]


def _schedules(
    schedule: str, drop_in: bool, optimizer: OptimizerFactory | None, clip_norm: float | None, more: bool
) -> list[str]:
    """The schedules to try; refuses what does not go together."""
    if drop_in != (optimizer is None):
        raise InputError(
            "loss_fn= and optimizer= go together: with both, train_step() trains; with neither, pipe(x) takes part in "
            "autograd and the caller computes the loss and updates"
        )
    if not drop_in:
        return list(STEP_SCHEDULES) if schedule == "auto" else [schedule]
    if clip_norm is not None or more:
        raise InputError("clip_norm=, check_finite= and keep_gradients= are for train_step(): give loss_fn= as well")
    if schedule != "auto" and schedule not in FILL_AND_DRAIN:
        raise PlanError(
            f"schedule={schedule!r} needs the loss of a micro-batch before the next one's forward: without loss_fn= "
            f"only {' and '.join(map(repr, FILL_AND_DRAIN))} can be used"
        )
    return list(FILL_AND_DRAIN) if schedule == "auto" else [schedule]


def weight_copies(optimizer: OptimizerFactory | None) -> float:
    """How much memory a trained weight needs, as a multiple of its own: see :func:`copies_kept`.

    Raises:
        InputError: if it makes no optimizer of a list of weights, or one that asks for more than gradients.
    """
    if optimizer is None:  # the caller's is not known: gradients alone
        return 2.0
    hint = "give what makes one for a list of weights, such as functools.partial(torch.optim.SGD, lr=0.1)"
    if isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer= is a {type(optimizer).__name__} already; every stage has its own: {hint}")
    try:
        return copies_kept(optimizer)
    except Exception as error:
        raise InputError(f"optimizer= cannot update a weight ({type(error).__name__}: {error}): {hint}") from error


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
