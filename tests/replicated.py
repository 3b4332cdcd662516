"""Plans with replicated stages made by hand, and pipelines of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import nn

from pipecompile.eager import eager_models
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.tree import flatten
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import Partition
from pipecompile.passes.trace import Trace
from pipecompile.pipelines.infer_driver import Compiler
from pipecompile.pipelines.inference import InferencePipeline
from pipecompile.runtime.measure import CpuMeasure


def plan(copies: Sequence[int], layers: Sequence[Sequence[int]], seconds: Sequence[float] | None = None) -> Plan:
    """Stage ``i`` of ``layers[i]`` on ``copies[i]`` devices, numbered so that replicas of stages interleave."""
    count, places = sum(copies), [list[int]() for _ in copies]
    waiting = [stage for turn in range(max(copies)) for stage, n in enumerate(copies) if turn < n]
    for device, stage in enumerate(waiting):
        places[stage].append(device)
    cost = seconds or [1e-3] * len(copies)
    stages = tuple(Stage(i, own[0], tuple(layers[i]), cost[i], replicas=tuple(own[1:])) for i, own in enumerate(places))
    cluster = Cluster(tuple(Device(f"cpu:{i}", core=i % 2) for i in range(count)))
    return Plan(stages, cluster, max(cost), max(cost), "none", 0.0, sum(cost))


def compiled(
    model: nn.Module,
    example: torch.Tensor,
    copies: Sequence[int],
    executor: Literal["inline", "process"] = "inline",
    *,
    ahead: int | None = None,
    **options: Any,
) -> InferencePipeline:
    """A pipeline of the model, its layers parted evenly into stages with so many copies."""
    with eager_models():
        traced = Trace().apply(model, (example,), {})
    leaves = flatten(((example,), {}))[0]
    compiler = Compiler(traced, leaves, CpuMeasure(), Lower(ahead), Partition(sum(copies)), 0.05)
    count, parts = len(traced.graph.layers), len(copies)
    ends = [0, *accumulate(count // parts + (i < count % parts) for i in range(parts))]
    made = plan(copies, [range(a, b) for a, b in pairwise(ends)])
    return InferencePipeline(compiler.package(made, ()), traced.tensors, model, executor=executor, **options)


class Net(nn.Module):
    """Stateless, with a skip from the first layer to the last; a negative first element raises in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.pick, self.last = nn.Embedding(4, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """An index of -1 in ``x[0, 0]`` is out of range, so that eager raises as well."""
        skip = torch.relu(self.first(x))
        y = self.third(torch.relu(self.second(skip)))
        y = y + self.pick(x[:, 0].long())
        return self.last(y + skip), skip


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def samples(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(2, 6, generator=generator) for _ in range(count)]
    for x in made:
        x[:, 0] = x[:, 0].abs() % 4
    return made


def bad() -> torch.Tensor:
    x = samples(1)[0]
    x[0, 0] = 9.0
    return x
