"""compile(mode="train"): the passes of a training step put together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pipecompile.errors import InputError, PipecompileWarning, PlanError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.tree import flatten
from pipecompile.options import Progress, silent
from pipecompile.passes.choose_step import ChooseStep
from pipecompile.passes.lower_step import LowerStep
from pipecompile.passes.part_counts import best_way, part_counts
from pipecompile.passes.recompute import Recompute
from pipecompile.pipelines.drop_in import FILL_AND_DRAIN
from pipecompile.pipelines.param_groups import Groups, ModelGroups
from pipecompile.pipelines.step_search import StepSearch, equal, every_way
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.pipelines.user_code import check_code
from pipecompile.runtime.batches import Reduction, batched_inputs, option
from pipecompile.runtime.training import Training
from pipecompile.runtime.update import OptimizerFactory
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
    data_parallel: int | None = None,
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
    threads: int = 0,
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
    copies = check_code(loss_fn, optimizer, executor)
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
    _check_autocast(autocast)
    everything = schedule == micro_batches == "auto" and executor == "process" and not throttle
    if data_parallel is None and everything and not drop_in:
        ways = every_way(cluster, counts, None, threads, memory_limit is not None)
    else:
        shared = 1 if data_parallel is None else data_parallel
        counts = _dealt(counts, shared, cluster)
        ways = every_way(cluster, counts, shared, threads, False)
    search = StepSearch(
        model,
        leaves,
        tree,
        batched,
        batch,
        ways,
        names,
        schedule == "auto",
        Training(loss_fn, optimizer, seed, full_loss=autocast is not None),
        example_targets,
        copies,
        LowerStep(1 if ahead is None else ahead, drop_in, early=clip_norm is None and not check_finite),
        Recompute(recompute, memory_limit),
        leaf=leaf,
        dynamic_batch=dynamic_batch,
        autocast=autocast,
        deferred=deferred_batch_norm,
        inline=executor == "inline" and cluster.card is None,
        imports=imports,
        time_limit=time_limit,
        profile_seconds=profile_seconds,
        tell=tell,
    )
    names_of_ways, choose = [way.name for way in ways], ChooseStep(memory_limit)
    raced = search.raced if executor == "process" and not throttle and not drop_in else None
    # Threads are timed in this process, whose cores others may have used meanwhile: one timing does not rule them out.
    alone = [i for i, way in enumerate(ways) if len(way.cluster.devices) == 1]
    index, chosen, notes = best_way(names_of_ways, search.least, search.tried, choose, search.beside, raced, alone)
    plan = chosen.plan
    if len(plan.cluster.devices) < len(ways[index].cluster.devices):
        warnings.warn("; ".join(plan.notes), PipecompileWarning, stacklevel=3)
    tell("codegen", 0.95)
    step = search.step(index, replace(chosen, plan=replace(plan, notes=(*plan.notes, *notes))))
    tell("done", 1.0)
    return TrainingPipeline(
        step,
        search.tensors(index),
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


def _dealt(counts: Sequence[int], data_parallel: int, cluster: Cluster) -> list[int]:
    """The numbers of micro-batches that so many pipelines can share; refuses what cannot be shared."""
    if data_parallel == 1:
        return list(counts)
    devices = len(cluster.devices)
    if data_parallel < 1 or devices % data_parallel:
        raise PlanError(f"data_parallel={data_parallel}: {devices} devices make no such number of equal pipelines")
    if not equal(cluster):
        raise PlanError(f"data_parallel={data_parallel}: equal pipelines need devices of one kind, speed and memory")
    found = [count for count in counts if count % data_parallel == 0]
    if not found:
        tried = ", ".join(map(str, counts))
        raise PlanError(f"data_parallel={data_parallel}: it must divide the number of micro-batches, {tried}")
    return found


def _check_autocast(dtype: torch.dtype | None) -> None:
    """Refuse a dtype whose gradients need more than autocast.

    Raises:
        InputError: naming what can be given.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"autocast={dtype!r} is no dtype of torch: write autocast=torch.bfloat16")
    if dtype not in (None, torch.bfloat16):
        raise InputError(
            f"autocast={dtype!r}: only torch.bfloat16 is possible; gradients in float16 vanish unless the loss is "
            "scaled, which is not done here"
        )


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
