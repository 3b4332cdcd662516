"""compile() and load(): the passes and the runtime put together."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import nn

from pipecompile import artefact, cache
from pipecompile.eager import eager_models
from pipecompile.errors import InputError, PipecompileWarning, PlanError
from pipecompile.inference import InferencePipeline
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.measure import Measure
from pipecompile.ir.package import Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import Program
from pipecompile.ir.tree import flatten
from pipecompile.passes.codegen import Codegen
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import ObjectiveName, Partition, with_memory
from pipecompile.passes.profile import ProfileLayers, whole_model
from pipecompile.passes.refine import Refine
from pipecompile.passes.schedule import Schedule
from pipecompile.passes.trace import Trace, Traced
from pipecompile.passes.verify import Verify
from pipecompile.runtime.batches import Reduction
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.simulate import simulate
from pipecompile.streams.engine import ExecutorName, OnFailure
from pipecompile.streams.entrance import Overload
from pipecompile.train_driver import RecomputeName, ScheduleName, compile_training
from pipecompile.training import TrainingPipeline

#: Called with the name of the phase that begins and the fraction of the work done, 0.0 to 1.0.
Progress = Callable[[str, float], None]


@overload
def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int | Sequence[str] | Cluster = 2,
    mode: Literal["infer"] = "infer",
    dynamic_shapes: Any | None = None,
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    executor: ExecutorName = "process",
    pin: Mapping[str, str | Sequence[str]] | None = None,
    colocate: Sequence[str | Sequence[str]] = (),
    replicate: bool = False,
    objective: ObjectiveName | tuple[ObjectiveName, float] = "throughput",
    memory: float | str | Mapping[str, float | str] | None = None,
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    use_cache: bool = True,
    hang_seconds: float | None = None,
    on_overload: Overload = "block",
    max_in_flight: int | None = None,
    deadline: float | None = None,
    on_failure: OnFailure = "raise",
    throttle: Mapping[str, Link] | None = None,
    imports: Sequence[str] = (),
    progress: Progress | None = None,
) -> InferencePipeline: ...


@overload
def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int | Sequence[str] | Cluster = 2,
    mode: Literal["train"],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    schedule: ScheduleName = "auto",
    micro_batches: int = 4,
    reduction: Reduction = "auto",
    example_targets: Any = None,
    clip_norm: float | None = None,
    memory_limit: int | None = None,
    recompute: RecomputeName = "none",
    deferred_batch_norm: bool = False,
    seed: int = 0,
    keep_gradients: bool = False,
    check_finite: bool = False,
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    executor: ExecutorName = "process",
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    hang_seconds: float | None = None,
    throttle: Mapping[str, Link] | None = None,
    imports: Sequence[str] = (),
    progress: Progress | None = None,
) -> TrainingPipeline: ...


def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int | Sequence[str] | Cluster = 2,
    mode: Literal["infer", "train"] = "infer",
    dynamic_shapes: Any | None = None,
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    executor: ExecutorName = "process",
    pin: Mapping[str, str | Sequence[str]] | None = None,
    colocate: Sequence[str | Sequence[str]] = (),
    replicate: bool = False,
    objective: ObjectiveName | tuple[ObjectiveName, float] = "throughput",
    memory: float | str | Mapping[str, float | str] | None = None,
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    use_cache: bool = True,
    hang_seconds: float | None = None,
    on_overload: Overload = "block",
    max_in_flight: int | None = None,
    deadline: float | None = None,
    on_failure: OnFailure = "raise",
    throttle: Mapping[str, Link] | None = None,
    imports: Sequence[str] = (),
    progress: Progress | None = None,
    **training: Any,
) -> InferencePipeline | TrainingPipeline:
    """Compile ``model``, called as ``model(*example_inputs, **example_kwargs)``, into a pipeline.

    Args:
        model: any module that ``torch.export`` can capture, on the CPU. It is compiled in eval
            mode; its own mode is left as it is. Its parameters stay its own objects and share
            their storage with the pipeline from the first use on.
        example_inputs: positional arguments of one call; a single tensor may stand alone.
        example_kwargs: keyword arguments of that call.
        devices: how many cores to use, names such as ``["cpu:0", "cpu:1"]``, or a Cluster. The link
            of a Cluster that names none is measured.
        mode: ``"infer"``, or ``"train"``: the model is compiled in train mode for one batch of the
            size of the example, and what follows ``progress`` below applies.
        dynamic_shapes: sizes that may differ from sample to sample, as for ``torch.export.export``.
        leaf: modules never cut inside: path patterns (``"encoder.layer.*"``) or module classes.
        ahead: how many messages a stage receives ahead of the one it works on; chosen if None.
        executor: ``"process"``, a pinned worker a device, or ``"inline"``, all in this process
            (slow; for debugging, breakpoints and tests).
        pin: layers that must run on a device: ``{"encoder.*": "cpu:0"}``, patterns of layer names or
            module paths to a device's name or several.
        colocate: patterns whose layers share a stage: ``["encoder.0.*", ["embed", "head"]]``.
        replicate: whether a stage may have copies on several devices, which take samples in turn (at
            the cost of its weights in each one's caches). Both the best plan with copies and the best
            without are measured, and the faster one by simulation is taken.
        objective: ``"throughput"`` (the busiest device's time per sample), ``"latency"`` (one
            sample's time through all stages), or ``("throughput", 0.02)``: the same, while the other
            stays at most so many seconds.
        memory: bytes (or ``"2 GiB"``) each device may take, or a mapping by device name.
        time_limit: seconds the planner may take; the best plan found until then is kept.
        profile_seconds: about how long to time the model.
        use_cache: keep profiles on disk and use them again for the same graph on the same machine.
        hang_seconds: how long a worker may compute one sample; max(2 s, 10 x profiled) if None.
        on_overload: what happens to samples that come too fast; the default of ``stream()``, and
            the policy of ``submit()``: ``"block"``, ``"drop_oldest"``, ``"drop_newest"``,
            ``"latest"`` or ``"error"``.
        max_in_flight: how many samples may be inside the pipeline; as many as its rings hold if None.
        deadline: seconds within which a sample must have entered, else it is dropped.
        on_failure: ``"raise"``: a worker that dies or hangs ends the pipeline with one exception.
            ``"restart"``: the workers are replaced and the samples in flight computed again, from
            copies kept meanwhile; buffers that the model writes to are put back to a snapshot
            first. After three deaths in a row without a new result the last one is raised.
        throttle: slow down edges (``{"0>1": Link(latency, bandwidth)}``): to try a slower network.
        imports: modules the workers import first because they register custom operators.
        progress: called as ``progress(phase, fraction)`` while compiling.
        training: for ``mode="train"`` only:
            ``loss_fn``: called as ``loss_fn(result, target)`` in the last stage; gives a scalar.
            ``optimizer``: called with a list of parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.1)``; one is made for each stage. Without both
            ``pipe(x)`` takes part in autograd, for a loss and an optimizer of the caller's (schedules
            ``"gpipe"`` and ``"breadth_first"`` only).
            ``schedule``: ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"breadth_first"``, ``"zb_h1"``,
            ``"zb_v"``, or ``"auto"``, which measures the stages and simulates all of them.
            ``micro_batches``: into how many parts a batch is split along dimension 0. Where it does
            not divide the example batch, sizes may differ from then on.
            ``reduction``: how the loss is reduced where ``loss_fn`` does not say: ``"mean"``, ``"sum"``,
            or a function of a target that counts what its mean is over.
            ``example_targets``: targets of the example batch, to measure the last stage with.
            ``clip_norm``: the largest norm of all gradients together.
            ``memory_limit``: bytes of activations a device may keep; ``schedule="auto"`` chooses within it.
            ``recompute``: ``"none"``; ``"stage"``: stages keep what they receive and compute the rest
            again for the backward; ``"auto"``: as few of them as ``memory_limit`` asks for.
            ``deferred_batch_norm``: running statistics are updated once a step, with those of the
            whole batch (each micro-batch is normalised by its own all the same).
            ``seed``: of dropout masks. ``keep_gradients``: for ``pipe.gradients()``.
            ``check_finite``: a step whose loss or gradients are NaN or infinite raises before the update.

    Raises:
        TraceError: if the model cannot be captured or its graph differs from eager.
        PlanError: if ``devices`` makes no sense, or no plan meets pins, colocation, memory and objective.
        InputError: if example inputs or dynamic shapes cannot be used.
    """
    if mode not in ("infer", "train"):
        raise PlanError(f"mode={mode!r} is not available: choose 'infer' or 'train'")
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"compile() takes an nn.Module, got {type(model).__name__}: put it into a module's forward()")
    if isinstance(example_inputs, Mapping):
        raise InputError("example_inputs are the positional arguments; give a dict of keywords as example_kwargs=")
    _check_options(mode, training)
    tell = progress or silent
    _import_aside("pulp")
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    cluster = with_memory(make_cluster(devices), memory)
    if mode == "train":
        if dynamic_shapes is not None:
            raise InputError("dynamic_shapes is for inference; in training only the batch size may change")
        if pin or colocate or replicate or objective != "throughput":
            raise InputError(
                "pin=, colocate=, replicate= and objective= are for inference; training balances all stages itself"
            )
        if (on_overload, max_in_flight, deadline, on_failure) != ("block", None, None, "raise"):
            raise InputError(
                "on_overload=, max_in_flight=, deadline= and on_failure= are for streams, not mode='train'"
            )
        return compile_training(
            model, args, kwargs, cluster, leaf=tuple(leaf), ahead=1 if ahead is None else ahead, executor=executor,
            time_limit=time_limit, profile_seconds=profile_seconds, hang_seconds=hang_seconds, throttle=throttle,
            imports=imports, tell=tell, **training,
        )  # fmt: skip
    partition = Partition(
        len(cluster.devices), time_limit=time_limit, objective=objective, pin=pin or {}, colocate=colocate
    )
    tell("trace", 0.0)
    with eager_models():
        traced = Trace(tuple(leaf), dynamic_shapes).apply(model, args, kwargs)
    compiler = Compiler(traced, flatten((args, kwargs))[0], CpuMeasure(), Lower(ahead), partition, profile_seconds)
    tell("profile", 0.3)
    profile = compiler.profile(use_cache)
    tell("partition", 0.6)
    if cluster.link == Link():
        cluster = replace(cluster, link=profile.link)
    plan = compiler.fastest(profile, cluster) if replicate else compiler.plan(profile, cluster)
    if len(plan.loads) < len(cluster.devices):
        warnings.warn("; ".join(plan.notes), PipecompileWarning, stacklevel=2)
    tell("codegen", 0.9)
    package = compiler.package(plan, tuple(imports))
    tell("done", 1.0)
    return InferencePipeline(
        package,
        traced.tensors,
        model,
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
        on_overload=on_overload,
        max_in_flight=max_in_flight,
        deadline=deadline,
        on_failure=on_failure,
    )


def _check_options(mode: str, training: Mapping[str, Any]) -> None:
    """Refuse options that nobody knows, that are for training only, and training without what it needs."""
    parameters = inspect.signature(compile_training).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in training:
        if name not in known:
            every = [*known, *inspect.signature(compile).parameters]
            close = difflib.get_close_matches(name, every, 1)
            raise TypeError(f"compile() has no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if training and mode == "infer":
        raise InputError(f"{', '.join(sorted(training))}: only mode='train' takes that")


def _import_aside(module: str) -> None:
    """Import in a thread of its own.

    PuLP keeps the tracebacks of imports that failed within it, and these keep every frame of whoever
    imported it first: the model compiled first, and the workers of its pipeline, would never end.
    """
    if module not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=(module,))
        thread.start()
        thread.join()


def silent(_phase: str, _fraction: float) -> None:
    """Progress that nobody watches."""


def load(
    path: str | os.PathLike[str],
    *,
    executor: ExecutorName = "process",
    trust: bool = False,
    hang_seconds: float | None = None,
    on_overload: Overload = "block",
    max_in_flight: int | None = None,
    deadline: float | None = None,
    on_failure: OnFailure = "raise",
    throttle: Mapping[str, Link] | None = None,
) -> InferencePipeline:
    """Load a pipeline written by ``save()``; the model's source is not needed. Options as for :func:`compile`.

    Raises:
        ArtefactError: if a file is missing, altered, too new, or holds code that is not allowed
            (``trust=True`` allows custom operators).
    """
    package, tensors = artefact.load(path, trust=trust)
    model = _skeleton(package, tensors)
    return InferencePipeline(
        package,
        tensors,
        model,
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
        on_overload=on_overload,
        max_in_flight=max_in_flight,
        deadline=deadline,
        on_failure=on_failure,
    )


def make_cluster(devices: int | Sequence[str] | Cluster) -> Cluster:
    """The Cluster meant by ``devices``.

    Raises:
        PlanError: for a count below one, an unknown kind of device or a core this process may not use.
    """
    if isinstance(devices, Cluster):
        return devices
    if isinstance(devices, str):
        devices = [devices]
    if not isinstance(devices, (int, Sequence)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlanError(f"devices={devices!r}: give a count, a list of names such as 'cpu:0', or a Cluster")
    cores = sorted(os.sched_getaffinity(0))
    if isinstance(devices, int):
        if devices < 1:
            raise PlanError(f"devices={devices}: at least one device is needed")
        if devices > len(cores):
            warnings.warn(
                f"{devices} devices on {len(cores)} cores: some share a core, so the pipeline cannot be faster "
                f"than with {len(cores)}",
                PipecompileWarning,
                stacklevel=3,
            )
        return Cluster(tuple(Device(f"cpu:{i}", core=cores[i % len(cores)]) for i in range(devices)))
    found: list[Device] = []
    for name in map(str, devices):
        kind, _, index = name.partition(":")
        if kind != "cpu" or not index.isdigit():
            raise PlanError(f"unknown device {name!r}: this version knows 'cpu:<number>'")
        if int(index) >= len(cores):
            raise PlanError(f"there is no device {name!r}: this process may use {len(cores)} cores (cpu:0 and up)")
        found.append(Device(name, core=cores[int(index)]))
    if not found:
        raise PlanError("devices is empty: at least one device is needed")
    if len(set(found)) < len(found):
        raise PlanError(f"devices={list(devices)!r} names a device twice: give each core one stage, or a count")
    return Cluster(tuple(found))


@dataclass(frozen=True)
class Compiler:
    """The passes after trace, with what they share."""

    traced: Traced
    leaves: list[Any]
    measure: Measure
    lower: Lower
    partition: Partition
    seconds: float

    def profile(self, use_cache: bool) -> Profile:
        """Measured, or from the cache."""
        traced = self.traced
        step = ProfileLayers(self.seconds)
        found = cache.load(step.digest(traced.graph, traced.module)) if use_cache else None
        if found is None or self._busy_then(found):
            found = step.apply(traced.graph, traced.module, traced.tensors, self.leaves, self.measure)
            if use_cache:
                cache.store(found)
        return found

    def _busy_then(self, profile: Profile) -> bool:
        """Whether the model now runs clearly faster than a cached profile says: other work disturbed that one."""
        traced = self.traced
        job = whole_model(traced.graph, traced.module, traced.tensors, self.leaves)
        (now,) = self.measure.functions([job], self.seconds / 8)
        return now < 0.9 * profile.total

    def plan(self, profile: Profile, cluster: Cluster, *, replicas: bool = False) -> Plan:
        """The best cut for all devices of a cluster, its stages timed. ``replicas``: stages may have copies."""
        traced = self.traced

        partition = replace(self.partition, stages=len(cluster.devices), replicas=replicas)

        def cut(profile: Profile) -> Plan:
            return partition.apply(traced.graph, profile, cluster)

        return Refine(budget=self.seconds / 4).apply(
            traced.graph, traced.module, traced.tensors, self.leaves, profile, cut, self.program, self.measure
        )

    def fastest(self, profile: Profile, cluster: Cluster, samples: int = 64) -> Plan:
        """The better of the best plan with and the best without replicas, by simulation of what was measured.

        Each is judged by its gain over the whole model, which was timed in turns with its stages: the
        machine may have changed its speed between the two.
        """
        plans = [self.plan(profile, cluster), self.plan(profile, cluster, replicas=True)]
        gains = [
            simulate(self.program(p), p, cluster.link, whole_rounds(p, samples)).throughput * p.total for p in plans
        ]
        if not plans[1].replicated:
            return plans[0]
        best = gains.index(max(gains))
        counts = [f"{plan.shape} {gain:.2f}x the model itself" for plan, gain in zip(plans, gains, strict=True)]
        return replace(plans[best], notes=(*plans[best].notes, f"by simulation {counts[0]}, {counts[1]}"))

    def program(self, plan: Plan) -> Program:
        """The verified stream program of a plan."""
        graph = self.traced.graph
        return Verify().apply(self.lower.apply(graph, plan, Schedule("stream").apply(plan)), graph, plan)

    def package(self, plan: Plan, imports: tuple[str, ...]) -> Package:
        """Generated code and everything that goes with it."""
        graph = self.traced.graph
        program = self.program(plan)
        specs = tuple(
            graph.values.get(name) or TensorSpec.of(leaf) for name, leaf in zip(graph.inputs, self.leaves, strict=True)
        )
        return Package(
            graph.name,
            Codegen().apply(graph, self.traced.module, plan, program),
            plan,
            program,
            graph.state,
            specs,
            graph.inputs,
            graph.outputs,
            graph.in_tree,
            graph.out_tree,
            graph.symbols,
            self.traced.parameters,
            imports,
        )


def whole_rounds(plan: Plan, samples: int) -> int:
    """About so many samples, such that the middle half of the stream is whole rounds of all replicas.

    Results of replicas come in bursts; a window that cuts one in two would count too much or too little.
    """
    rounds = math.lcm(*(len(stage.devices) for stage in plan.stages))
    return 4 * rounds * math.ceil(samples / (4 * rounds)) + 1


def _skeleton(package: Package, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module tree that holds a loaded package's parameters and buffers under their old names."""
    root = nn.Module()
    for entry in package.state:
        if entry.kind == "constant":
            continue
        *path, key = entry.fqn.split(".")
        owner = root
        for part in path:
            child = owner._modules.get(part)  # pyright: ignore[reportPrivateUsage]
            if child is None:
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        if entry.kind == "buffer":
            owner.register_buffer(key, tensors[entry.name], persistent=entry.persistent)
        else:
            parameter = nn.Parameter(tensors[entry.name], requires_grad=entry.requires_grad)
            owner.register_parameter(key, parameter)
            tensors[entry.name] = parameter  # type: ignore[index]
    return root
