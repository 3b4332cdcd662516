"""Two stages or two replicas: does compile(replicate=True) choose what measures faster?

    python -m bench.replicas [--rounds 6] [--seconds 0.4] [--models "conv chain 30" ...]

Two devices, three ways, in turns in every round: the plan without replicas, a copy of the whole
model on each device, and whatever the compiler chose. The control of each ratio is the first of the
three measured again in the same round: it shows what the machine itself changes meanwhile.
Reported are samples a second (medians of the rounds) and chosen / faster of the two with the
interval of the ratio by resampling the rounds.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice, repeat

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pipecompile
from bench.models import MODELS, build
from bench.stream import bootstrap, stream_rate
from pipecompile.eager import eager_models
from pipecompile.ir.plan import Plan
from pipecompile.ir.tree import flatten
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import Partition
from pipecompile.passes.trace import Trace
from pipecompile.pipelines.infer_driver import Compiler
from pipecompile.pipelines.inference import InferencePipeline
from pipecompile.runtime.measure import CpuMeasure

_MODELS = ("conv chain 30", "mlp 16x1024", "resnet18 224px")


def copies(plan: Plan) -> Plan:
    """The whole model on every device of another plan's cluster."""
    stage = plan.stages[0]
    layers = tuple(sorted(layer for each in plan.stages for layer in each.layers))
    others = tuple(range(1, len(plan.cluster.devices)))
    return replace(plan, stages=(replace(stage, device=0, layers=layers, replicas=others, measured=plan.total),))


def measure(name: str, rounds: int, seconds: float) -> tuple[str, dict[str, np.ndarray]]:
    """What was chosen, and rates by way, one a round."""
    model, example = build(name)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stages = stack.enter_context(pipecompile.compile(model, example, devices=2))
        chosen = stack.enter_context(pipecompile.compile(model, example, devices=2, replicate=True))
        with eager_models():
            traced = Trace().apply(model, tuple(example), {})
        leaves = flatten((tuple(example), {}))[0]
        compiler = Compiler(traced, leaves, CpuMeasure(), Lower(), Partition(2), 1.0)
        package = compiler.package(copies(stages.plan), ())
        replicas = stack.enter_context(InferencePipeline(package, traced.tensors, model))
        ways = {"stages": stages, "replicas": replicas, "chosen": chosen, "again": stages}
        for pipe in (stages, replicas, chosen):
            list(pipe.stream(islice(repeat(example), 10)))
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, pipe in ways.items():
                rates[way].append(stream_rate(pipe, example, seconds))
        return chosen.plan.shape, {way: np.array(seen) for way, seen in rates.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(_MODELS))
    options = parser.parse_args()
    columns = ("2 stages", "2 replicas", "chosen", "replicas / stages", "chosen / faster", "control")
    table = Table("model", *columns, "choice")
    table.title = f"samples/s, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"
    for name in options.models:
        choice, rates = measure(name, options.rounds, options.seconds)
        faster = max(("stages", "replicas"), key=lambda way: float(np.median(rates[way])))
        ratios = [
            bootstrap(rates[one] / rates[two])
            for one, two in (("replicas", "stages"), ("chosen", faster), ("again", "stages"))
        ]
        cells = [f"{np.median(rates[way]):.1f}" for way in ("stages", "replicas", "chosen")]
        table.add_row(name, *cells, *(f"{r:.3f} [{low:.3f}, {high:.3f}]" for r, low, high in ratios), choice)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
