"""What every number of stages would bring: the plans beside each other, predicted by the simulator."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipecompile.clusters import make_cluster
from pipecompile.eager import eager_models
from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.tree import flatten
from pipecompile.options import Progress, silent
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import ObjectiveName, Partition, Size, with_memory
from pipecompile.passes.trace import Trace
from pipecompile.pipelines.infer_driver import Compiler, whole_rounds
from pipecompile.runtime.measure import CpuMeasure
from pipecompile.simulate import simulate

#: A gain smaller than this is not worth another process, and within what predictions err by.
_WORTH = 1.05


@dataclass(frozen=True)
class Alternative:
    """One way to use a number of devices. ``throughput`` in samples a second, latencies (medians) in seconds.

    ``latency`` is that of a sample alone, ``loaded_latency`` that of a sample in a full pipeline.
    """

    plan: Plan
    program: Program
    throughput: float
    latency: float
    loaded_latency: float


@dataclass(frozen=True)
class Alternatives:
    """All of them, by number of devices, stages before replicas.

    ``eager`` is the seconds the model itself takes on one thread. ``refused`` are the numbers of
    devices, fewer than asked for, with which no plan does what is asked, and why.
    """

    model: str
    eager: float
    each: tuple[Alternative, ...]
    refused: Mapping[int, str] = field(default_factory=dict[int, str])

    @property
    def best(self) -> Alternative | None:
        """The fewest devices that come within 5% of the highest throughput; None if the model itself does."""
        highest = max(alternative.throughput for alternative in self.each)
        if highest * self.eager < _WORTH:
            return None
        close = [alternative for alternative in self.each if alternative.throughput * _WORTH >= highest]
        fewest = min(len(alternative.plan.loads) for alternative in close)
        return max((a for a in close if len(a.plan.loads) == fewest), key=lambda a: a.throughput)

    @property
    def advice(self) -> str:
        """What to do, in words."""
        best, asked = self.best, self.each[-1]
        if best is None:
            return (
                "One device is as fast or faster: handing samples on would cost what working side by side gains. "
                f"Call the model itself{'' if 1 in self.refused else ', or compile with --devices 1'}."
            )
        gain, several = best.throughput * self.eager, len(best.plan.loads) > 1
        if len(best.plan.loads) == len(asked.plan.loads):
            how = " Compile with replicate=True (--replicate)." if best.plan.replicated else ""
            return f"{best.plan.shape} are the fastest: {gain:.2f}x the samples a second of the model itself.{how}"
        return (
            f"{best.plan.shape} {'are' if several else 'is'} enough ({gain:.2f}x the model itself): "
            f"{asked.plan.shape} would give {asked.throughput / best.throughput:.2f}x of that."
        )


def alternatives(
    model: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    devices: int | Sequence[str] | Cluster = 2,
    dynamic_shapes: Any | None = None,
    leaf: Sequence[str | type[nn.Module]] = (),
    ahead: int | None = None,
    pin: Mapping[str, str | Sequence[str]] | None = None,
    colocate: Sequence[str | Sequence[str]] = (),
    objective: ObjectiveName | tuple[ObjectiveName, float] = "throughput",
    memory: Size | Mapping[str, Size] | None = None,
    time_limit: float = 10.0,
    profile_seconds: float = 2.0,
    use_cache: bool = True,
    samples: int = 64,
    progress: Progress | None = None,
) -> Alternatives:
    """Plan ``model`` for one device, two, and so on up to ``devices``; arguments as for :func:`compile`.

    Where copies of stages can be better, the best plan with them stands beside that without.
    ``samples`` is how many the simulator runs for each.

    Raises:
        TraceError, PlanError, InputError: as :func:`compile` does.
    """
    tell = progress or silent
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    cluster = with_memory(make_cluster(devices), memory)
    partition = Partition(
        len(cluster.devices), time_limit=time_limit, objective=objective, pin=pin or {}, colocate=colocate
    )
    tell("trace", 0.0)
    with eager_models():
        traced = Trace(tuple(leaf), dynamic_shapes).apply(model, args, kwargs)
    leaves = flatten((args, kwargs))[0]
    compiler = Compiler(traced, leaves, CpuMeasure(), Lower(ahead), partition, profile_seconds, True)
    tell("profile", 0.2)
    profile = compiler.profile(use_cache)
    count = min(len(cluster.devices), max(1, len(traced.graph.layers)))
    link = profile.link if cluster.link == Link() else cluster.link
    found: list[Alternative] = []
    refused: dict[int, str] = {}
    for stages in range(1, count + 1):
        tell(f"{stages} stages" if stages > 1 else "1 stage", 0.4 + 0.6 * (stages - 1) / count)
        part = replace(cluster, devices=cluster.devices[:stages], link=link)
        try:
            plans = [compiler.plan(profile, part)]
        except PlanError as error:
            if stages == count:
                raise
            refused[stages] = str(error)
            continue
        if stages > 1:
            plans += [p for p in [compiler.plan(profile, part, replicas=True)] if p.replicated]
        found += [_alternative(plan, compiler.program(plan), samples) for plan in plans]
    tell("done", 1.0)
    return Alternatives(traced.graph.name, profile.total, tuple(found), refused)


def _alternative(plan: Plan, program: Program, samples: int) -> Alternative:
    link = plan.cluster.link
    loaded = simulate(program, plan, link, whole_rounds(plan, samples))
    # Far enough apart that no two samples meet.
    apart = 2 * sum(stage.load for stage in plan.stages) + 1e-3
    alone = simulate(program, plan, link, 3, interval=apart)
    middle = loaded.latencies[len(loaded.latencies) // 4 :]
    return Alternative(plan, program, loaded.throughput, statistics.median(alone.latencies), statistics.median(middle))
