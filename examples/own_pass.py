"""Two passes of one's own between the compiler's: one that reads a plan, one that changes it.

``Cheapest`` moves the border between two stages to where the fewest bytes cross it, within reach;
``Show`` prints what goes by. In a ResNet the borders differ: the later, the fewer bytes.

    python examples/own_pass.py
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from pipecompile.clusters import make_cluster
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.passes.lower import Lower, crossings
from pipecompile.passes.partition import Partition
from pipecompile.passes.trace import Trace
from pipecompile.pipelines.infer_driver import Compiler
from pipecompile.pipelines.inference import InferencePipeline
from pipecompile.runtime.measure import CpuMeasure


def sent(graph: ModelGraph, plan: Plan) -> int:
    """Bytes from stage 0 to stage 1, a sample."""
    return sum(graph.values[value].nbytes for value in crossings(graph, plan).get((0, 1), ()))


def cut_at(plan: Plan, border: int, layers: int) -> Plan:
    """The plan with its first ``border`` layers in stage 0; what was measured of its stages is forgotten."""
    ranges = tuple(range(border)), tuple(range(border, layers))
    return replace(plan, stages=tuple(replace(s, layers=ranges[s.index], measured=None) for s in plan.stages))


@dataclass(frozen=True)
class Cheapest:
    """Move the border of a two-stage plan, by at most ``reach`` layers, to where the fewest bytes cross."""

    reach: int = 6

    def apply(self, graph: ModelGraph, plan: Plan) -> Plan:
        layers, now = len(graph.layers), len(plan.stages[0].layers)
        near = range(max(1, now - self.reach), min(layers, now + self.reach + 1))
        plans = [cut_at(plan, border, layers) for border in sorted(near, key=lambda border: abs(border - now))]
        return min(plans, key=lambda each: sent(graph, each))


@dataclass(frozen=True)
class Show:
    """Print a plan and give it back."""

    title: str

    def apply(self, graph: ModelGraph, plan: Plan) -> Plan:
        last = graph.layers[plan.stages[0].layers[-1]].name
        print(f"{self.title}: stage 0 ends after {last}; {sent(graph, plan):,} bytes a sample go to stage 1")
        return plan


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = ResNetConfig(layer_type="basic", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], embedding_size=16)
    model, x = ResNetForImageClassification(config).eval(), torch.rand(1, 3, 96, 96)
    traced = Trace().apply(model, (x,), {})
    compiler = Compiler(traced, [x], CpuMeasure(), Lower(), Partition(2), 0.5)
    plan = compiler.plan(compiler.profile(use_cache=True), make_cluster(2))
    for each in (Show("planned"), Cheapest(), Show("cheapest")):
        plan = each.apply(traced.graph, plan)
    with InferencePipeline(compiler.package(plan, ()), traced.tensors, model) as pipe, torch.no_grad():
        equal = torch.equal(pipe(x)["logits"], model(x)["logits"])
    print("the pipeline gives what the model gives" if equal else "the pipeline does NOT give what the model gives")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
