"""Search for the fastest training step: ways to use the devices, planned, measured, and the best few tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from pipecompile.eager import eager_models
from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.measure import Measure
from pipecompile.ir.profile import Profile
from pipecompile.ir.training import Gradients, StepPackage, StepRequest
from pipecompile.ir.tree import Tree, unflatten
from pipecompile.options import Progress
from pipecompile.passes.choose_step import Candidate
from pipecompile.passes.codegen_step import CodegenStep
from pipecompile.passes.custom_operators import imports_of
from pipecompile.passes.lower_step import LowerStep, owners, weight_users
from pipecompile.passes.measure_step import MeasuredStep, MeasureStep
from pipecompile.passes.plan_step import training_profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.passes.recompute import Recompute
from pipecompile.passes.smaller_batches import SmallerBatches
from pipecompile.passes.trace import Traced
from pipecompile.passes.trace_step import TraceStep
from pipecompile.pipelines.drop_in import FILL_AND_DRAIN
from pipecompile.pipelines.search_time import SearchTime
from pipecompile.pipelines.step_planner import ExampleLoss, StepPlanner, package_of, update_seconds
from pipecompile.runtime.batches import moved, split_inputs, split_targets
from pipecompile.runtime.cuda_measure import CudaMeasure
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.step_trial import ResultLoss, free_memory, step_seconds
from pipecompile.runtime.training import Training
from pipecompile.schedules.training import STEP_SCHEDULES


class Way(NamedTuple):
    """Devices, a number of micro-batches, and how many equal pipelines share them both."""

    cluster: Cluster
    micro_batches: int
    data_parallel: int = 1

    @property
    def name(self) -> str:
        """In words."""
        threads = self.cluster.devices[0].threads
        if len(self.cluster.devices) == 1:
            return f"{self.micro_batches} in one worker" + (f" with {threads} threads" if threads > 1 else "")
        shared = f" in {self.data_parallel} data-parallel pipelines" if self.data_parallel > 1 else ""
        return f"{self.micro_batches}{shared}"

    @property
    def part(self) -> Cluster:
        """The devices of one pipeline."""
        each = len(self.cluster.devices) // self.data_parallel
        return replace(self.cluster, devices=self.cluster.devices[:each])


class _Front(NamedTuple):
    """A model captured for micro-batches of one size and timed with one number of threads."""

    traced: Traced
    gradients: Gradients
    leaves: list[Any]
    measure: Measure
    measured: Profile
    update: Callable[[tuple[str, ...]], float]
    stages: dict[Any, MeasuredStep]
    imports: tuple[str, ...]


def every_way(
    cluster: Cluster, counts: Sequence[int], data_parallel: int | None, threads: int, all_counts: bool
) -> list[Way]:
    """What to try for these numbers of micro-batches, the cheapest to plan first.

    With ``data_parallel`` None that is one worker with all ``threads``, if any (a batch whole, or in every number of
    parts), then a pipeline of one stage on each device, then one pipeline over all of them.
    """
    if data_parallel is not None:
        return [Way(cluster, count, data_parallel) for count in counts]
    memory = min((d.memory for d in cluster.devices if d.memory is not None), default=None)
    whole, every = Cluster((Device("cpu", threads=threads, memory=memory),), cluster.link), len(cluster.devices)
    alone = [Way(whole, count) for count in ([1, *counts] if all_counts else [1])] if threads and every > 1 else []
    copied = [Way(cluster, count, every) for count in counts if count % every == 0] if equal(cluster) else []
    return [*alone, *(copied if every > 1 else []), *(Way(cluster, count) for count in counts)]


def equal(cluster: Cluster) -> bool:
    """Whether all devices can do the same."""
    return len({(device.kind, device.speed, device.memory, device.threads) for device in cluster.devices}) == 1


@dataclass
class StepSearch:
    """One model, one example batch, and the ways to train it.

    ``names`` are the schedules to try, or with ``free`` those that fit. ``leaves`` are the flat inputs of a whole
    batch, ``batched`` says which of them are split. Times are measured for about ``profile_seconds``.
    """

    model: nn.Module
    leaves: Sequence[Any]
    tree: Tree
    batched: tuple[bool, ...]
    batch: int
    ways: Sequence[Way]
    names: Sequence[str]
    free: bool
    training: Training
    targets: Any
    copies: float
    lower: LowerStep
    recompute: Recompute
    leaf: Sequence[str | type[nn.Module]] = ()
    dynamic_batch: bool = False
    autocast: torch.dtype | None = None
    deferred: bool = False
    inline: bool = False
    imports: Sequence[str] = ()
    time_limit: float = 10.0
    profile_seconds: float = 2.0
    tell: Progress = lambda _phase, _fraction: None

    def __post_init__(self) -> None:
        self._search = SearchTime(self.time_limit)
        self._fronts: dict[tuple[int, int], _Front] = {}
        self._planners: dict[int, tuple[StepPlanner, Profile]] = {}

    @cached_property
    def _dtype(self) -> str | None:
        return None if self.autocast is None else str(self.autocast).removeprefix("torch.")

    @property
    def _card(self) -> str | None:
        return self.ways[-1].cluster.card

    def _half(self) -> AbstractContextManager[Any]:
        """Torch's autocast without its cache: what that holds of a run without gradients has none."""
        kind = "cpu" if self._card is None else "cuda"
        return torch.autocast(kind, dtype=self.autocast, cache_enabled=False) if self.autocast else nullcontext()

    def _alone(self, way: Way) -> bool:
        """Whether there is one stage, for which all schedules are one."""
        return self.free and len(way.part.devices) == 1

    def smaller(self, micro_batches: int) -> bool:
        """Whether micro-batches may have fewer samples than the first of the example."""
        return self.dynamic_batch or self.batch % micro_batches > 0

    def least(self, index: int) -> float:
        """Seconds that no schedule of a way can be far below."""
        planner, profile = self._planner(index)
        return planner.work(profile) / len(planner.cluster.devices)

    def tried(self, index: int) -> list[Candidate]:
        """The candidates of a way.

        Raises:
            PlanError: if none can be planned.
        """
        (planner, profile), way = self._planner(index), self.ways[index]
        self._search.plans = sum(1 if self._alone(way) else len(self.names) for way in self.ways[index:])
        few, names = len(planner.traced.graph.layers), list(self.names)
        if self.free:
            names = [name for name in names if STEP_SCHEDULES[name].chunks <= few]
        if self._alone(way):
            names = ["1f1b" if "1f1b" in names else FILL_AND_DRAIN[0]]
        found, errors = list[Candidate](), list[PlanError]()
        for name in names:
            try:
                made = planner.repeated(planner.candidate(name, profile), way.data_parallel, way.cluster)
                found.append(planner.with_updates(made, self._front(way).update))
            except PlanError as error:  # one with more stages a device may not fit where another does
                errors.append(error)
        if not found:
            raise errors[0]
        return found

    def beside(self, index: int, found: Sequence[Candidate]) -> Sequence[Candidate]:
        """Candidates of a way with the costs of their stages as they are while all devices compute."""
        return found if self.inline else self._planner(index)[0].beside(found, self.profile_seconds / 8)

    def step(self, index: int, found: Candidate) -> StepPackage:
        """What a runtime needs to carry out a candidate's step."""
        planner, way, plan, program = self._planner(index)[0], self.ways[index], found.plan, found.program
        traced, gradients, graph = planner.traced, planner.gradients, planner.traced.graph
        smaller = self.smaller(way.micro_batches)
        codegen = CodegenStep(deferred=self.deferred, autocast=self._dtype, fewer=smaller)
        modules = codegen.apply(graph, traced.module, plan, program, gradients)
        owned = {stage: tuple(names) for stage, names in owners(weight_users(graph, plan, gradients.weights)).items()}
        package = package_of(traced, planner.leaves, modules, plan, program)
        package = replace(package, imports=self._front(way).imports)
        return StepPackage(package, owned, self.batched, self.batch, smaller)

    def tensors(self, index: int) -> dict[str, torch.Tensor]:
        """The model's parameters, buffers and constants by placeholder name."""
        return self._planner(index)[0].traced.tensors

    def raced(self, found: Sequence[tuple[int, Candidate]]) -> list[float]:
        """Measured seconds a step of candidates of ways, in real workers that take turns.

        Raises:
            PipecompileError: if workers do not start, a step fails, or there is too little memory to hold all.
        """
        weights = sum(tensor.nbytes for tensor in self.tensors(found[0][0]).values())
        needed = sum(int(weights * (self.copies + c.plan.data_parallel - 1) + c.memory) for _, c in found)
        if needed > (free := free_memory()) / 2:
            raise PlanError(f"a trial would need {needed:,} bytes for weights and activations, {free:,} are free")
        self.tell("trial", 0.88)
        steps = [(self.step(index, candidate), self.tensors(index)) for index, candidate in found]
        training, requests = self.training, list[StepRequest]()
        if self.targets is None:
            training = replace(training, loss_fn=ResultLoss())
        for index, _ in found:
            count = self.ways[index].micro_batches
            rows = split_inputs(self.leaves, self.batched, count)
            targets = [None] * count if self.targets is None else split_targets(self.targets, self.batch, count)
            requests.append(StepRequest(0, rows, targets, [1 / count] * count))
        return step_seconds(steps, training, requests, self.profile_seconds / 8, 4 * self.profile_seconds)

    def _front(self, way: Way) -> _Front:
        count, threads = way.micro_batches, way.cluster.devices[0].threads
        if (count, threads) in self._fronts:
            return self._fronts[count, threads]
        at, part = 0.85 * len(self._fronts) / len(self.ways), 1 / len(self.ways)
        first = split_inputs(self.leaves, self.batched, count)[0]
        args, kwargs = unflatten(self.tree, first)
        several = self.smaller(count) and self.batch > count
        dynamic = _batch_dims(self.tree, self.batched) if several else None
        least = min(self.batch // count, 2) if self.dynamic_batch else self.batch // count
        smaller = SmallerBatches(self.batched, least) if several else None
        self.tell("trace", at)
        with eager_models(), self._half():
            tracer = TraceStep(tuple(self.leaf), dynamic, self._card or "cpu", smaller)
            traced, gradients = tracer.trace(self.model, args, kwargs)
        needed = imports_of(traced.module, self.imports)
        measure = CpuMeasure(threads=threads, imports=needed) if self._card is None else CudaMeasure(self._card)
        self.tell("profile", at + 0.3 * part)
        with self._half():
            layers = ProfileLayers(self.profile_seconds)
            measured = layers.apply(traced.graph, traced.module, traced.tensors, first, measure)
        self.tell("partition", at + 0.6 * part)
        known: dict[tuple[str, ...], float] = {}

        def update(weights: tuple[str, ...]) -> float:
            if weights not in known:
                with stage_mode(threads):
                    known[weights] = update_seconds(self.training.optimizer, traced, weights)
            return known[weights]

        found = _Front(traced, gradients, first, measure, measured, update, {}, needed)
        self._fronts[count, threads] = found
        return found

    def _planner(self, index: int) -> tuple[StepPlanner, Profile]:
        """What plans one pipeline of a way, and the profile of a micro-batch.

        Raises:
            PlanError: if the model cannot have copies.
        """
        if index in self._planners:
            return self._planners[index]
        way = self.ways[index]
        front = self._front(way)
        graph, count = front.traced.graph, way.micro_batches
        written = [entry.fqn for entry in graph.state if entry.mutated]
        if way.data_parallel > 1 and written:
            raise PlanError(
                f"data_parallel={way.data_parallel}: the model writes to {written[0]!r}"
                + (f" and {len(written) - 1} other buffers" if len(written) > 1 else "")
                + ", which pipelines with the same weights would do at the same time: use data_parallel=1"
            )
        targets = None if self.targets is None else split_targets(self.targets, self.batch, count)[0]
        if targets is not None and self._card is not None:
            targets = moved(targets, self._card)
        loss = ExampleLoss(self.training.loss_fn, graph.out_tree, targets, self.autocast is not None)
        planner = StepPlanner(
            front.traced,
            front.gradients,
            front.leaves,
            loss,
            front.measure,
            replace(way.part, link=front.measured.link),
            count // way.data_parallel,
            self.lower,
            self.recompute,
            MeasureStep(self.profile_seconds / 8, self.deferred, self._dtype, turns=not self.inline),
            self._search,
            self.copies,
            measured=front.stages,
        )
        again = self.recompute.mode == "stage"
        self._planners[index] = planner, training_profile(graph, front.measured, front.gradients, again=again)
        return self._planners[index]


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


__all__ = ["StepSearch", "Way", "equal", "every_way"]
