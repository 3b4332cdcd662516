"""compile(mode="infer"): the passes of a stream put together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pipecompile import cache
from pipecompile.eager import eager_models
from pipecompile.errors import PipecompileError, warn
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.measure import Measure
from pipecompile.ir.package import Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import Program
from pipecompile.ir.tree import flatten
from pipecompile.options import Progress, silent
from pipecompile.passes.codegen import Codegen
from pipecompile.passes.custom_operators import imports_of
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import ObjectiveName, Partition
from pipecompile.passes.profile import ProfileLayers, whole_model
from pipecompile.passes.refine import Refine
from pipecompile.passes.schedule import Schedule
from pipecompile.passes.trace import Trace, Traced
from pipecompile.passes.verify import Verify
from pipecompile.pipelines.inference import InferencePipeline
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.simulate import simulate
from pipecompile.streams.engine import ExecutorName, OnFailure
from pipecompile.streams.entrance import Overload


def compile_inference(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    cluster: Cluster,
    *,
    dynamic_shapes: Any | None = None,
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    executor: ExecutorName = "process",
    pin: Mapping[str, str | Sequence[str]] | None = None,
    colocate: Sequence[str | Sequence[str]] = (),
    replicate: bool = False,
    objective: ObjectiveName | tuple[ObjectiveName, float] = "throughput",
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
) -> InferencePipeline:
    """See :func:`pipecompile.compile`; ``args`` and ``kwargs`` are one sample."""
    tell = progress or silent
    partition = Partition(
        len(cluster.devices), time_limit=time_limit, objective=objective, pin=pin or {}, colocate=colocate
    )
    tell("trace", 0.0)
    with eager_models():
        traced = Trace(tuple(leaf), dynamic_shapes).apply(model, args, kwargs)
    imports = imports_of(traced.module, imports)
    measure, leaves = CpuMeasure(imports=imports), flatten((args, kwargs))[0]
    compiler = Compiler(traced, leaves, measure, Lower(ahead), partition, profile_seconds, executor == "process")
    tell("profile", 0.3)
    profile = compiler.profile(use_cache)
    tell("partition", 0.6)
    if cluster.link == Link():
        cluster = replace(cluster, link=profile.link)
    plan = compiler.fastest(profile, cluster, imports) if replicate else compiler.plan(profile, cluster)
    if len(plan.loads) < len(cluster.devices):
        warn("; ".join(plan.notes))
    tell("codegen", 0.9)
    package = compiler.package(plan, imports)
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


@dataclass(frozen=True)
class Compiler:
    """The passes after trace, with what they share. ``beside``: stages will run at once, and are timed so."""

    traced: Traced
    leaves: list[Any]
    measure: Measure
    lower: Lower
    partition: Partition
    seconds: float
    beside: bool = False

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

        return Refine(budget=self.seconds / 4, beside=self.beside).apply(
            traced.graph, traced.module, traced.tensors, self.leaves, profile, cut, self.program, self.measure
        )

    def fastest(
        self, profile: Profile, cluster: Cluster, imports: tuple[str, ...] = (), samples: int = 64, close: float = 1.3
    ) -> Plan:
        """The better of the best plan with and the best without replicas.

        Each is simulated from what was measured, and judged by its gain over the whole model, which was
        timed in turns with its stages: the machine may have changed its speed between the two. Stages
        timed alone do not tell what they do to each other's caches, so where the two gains differ
        by less than the factor ``close`` both run for a moment in real workers.
        """
        plans = [self.plan(profile, cluster), self.plan(profile, cluster, replicas=True)]
        if not plans[1].replicated:
            return plans[0]
        gains = [
            simulate(self.program(p), p, cluster.link, whole_rounds(p, samples)).throughput * p.total for p in plans
        ]
        counts = [f"{plan.shape} {gain:.2f}x the model itself" for plan, gain in zip(plans, gains, strict=True)]
        notes = [f"by simulation {counts[0]}, {counts[1]}"]
        if max(gains) < close * min(gains):
            try:
                packages = [self.package(plan, imports) for plan in plans]
                gains = self.measure.streams(packages, self.traced.tensors, self.leaves)
                counts = [f"{plan.shape} {rate:.4g} samples/s" for plan, rate in zip(plans, gains, strict=True)]
                notes.append(f"tried in workers: {counts[0]}, {counts[1]}")
            except PipecompileError as error:
                notes.append(f"they could not be tried in workers: {error}")
        best = plans[gains.index(max(gains))]
        return replace(best, notes=(*best.notes, *notes))

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
