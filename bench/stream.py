"""How fast is a stream, against everything else two cores can do with the same model?

    python -m bench.stream [--rounds 10] [--seconds 0.7] [--models "resnet18 224px" ...]

All candidates take turns in every round, the single stages too. The control is two independent
one-thread copies of the model against one: what this machine's two cores are worth in that minute.
The limit of a pipeline is total / slowest stage, its balance half of that; it can pass 1 where half
the weights fit a core's cache. Reported is r / (control x balance), with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections import defaultdict
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pipecompile
from bench.models import MODELS, build
from bench.processes import EagerProcess, StageProcess
from bench.torch_pipelining import TorchPipeline

Rates = dict[str, list[float]]


def stream_rate(pipe: Any, item: Any, seconds: float) -> float:
    """Samples a second of a stream in steady state: filling and draining are left out."""
    stop = time.perf_counter() + seconds
    arrivals: list[float] = []

    def samples() -> Any:
        while time.perf_counter() < stop or len(arrivals) < 8:
            yield item

    for _ in pipe.stream(samples()):
        arrivals.append(time.perf_counter())  # noqa: PERF401 samples() reads it meanwhile
    steady = [at for at in arrivals[4:] if at <= stop] or arrivals[4:]
    return (len(steady) - 1) / (steady[-1] - steady[0]) if len(steady) > 1 else float("nan")


def measure(name: str, rounds: int, seconds: float) -> tuple[Any, Rates]:
    """Rates of every candidate, one entry a round."""
    model, example = build(name)
    torch.set_num_threads(1)
    rates: Rates = defaultdict(list)
    with (
        pipecompile.compile(model, example, devices=2) as pipe,
        EagerProcess(name, [0], 1) as first,
        EagerProcess(name, [1], 1) as second,
        EagerProcess(name, [0, 1], 2) as both,
        StageProcess(pipe, example, 0) as alone,
        TorchPipeline(name, pipe) as peer,
    ):
        list(pipe.stream(islice(repeat(example), 20)))
        for _ in range(rounds):
            rates["eager, 1 thread"].append(first.run(seconds))
            first.begin(seconds)
            second.begin(seconds)
            rates["two replicas"].append(first.rate() + second.rate())
            rates["slowest stage"].append(1 / max(alone.run(seconds)))
            rates["pipeline"].append(stream_rate(pipe, example, seconds))
            rates["eager, 2 threads"].append(both.run(seconds))
            rates["torch pipelining"].append(peer.run(seconds))
    return pipe.plan, rates


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Median and its 95% bootstrap interval."""
    draws = np.random.default_rng(seed).choice(values, (2000, len(values)))
    medians = np.median(draws, axis=1)
    return float(np.median(values)), float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.7)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    options = parser.parse_args()
    console = Console(width=150)
    console.print(
        f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {platform.machine()}  {os.cpu_count()} cores"
    )
    table = Table(
        "model", "eager 1t ms", "slowest ms", "balance", "limit", "control", "pipeline", "eager 2t", "torch pp"
    )
    table.add_column("r/(control x balance) [95%]")
    for name in options.models:
        plan, rates = measure(name, options.rounds, options.seconds)
        one = np.array(rates["eager, 1 thread"])
        ratio = {key: np.array(values) / one for key, values in rates.items()}
        balance = ratio["slowest stage"] / len(plan.stages)
        slowest = 1 / np.median(rates["slowest stage"])
        score, low, high = bootstrap(ratio["pipeline"] / (ratio["two replicas"] * balance))
        table.add_row(
            name,
            f"{1e3 / np.median(one):.2f}",
            f"{slowest * 1e3:.2f}",
            f"{np.median(balance):.3f}",
            f"{np.median(ratio['slowest stage']):.2f}x",
            *(f"{np.median(ratio[k]):.2f}x" for k in ("two replicas", "pipeline", "eager, 2 threads")),
            f"{np.nanmedian(ratio['torch pipelining']):.2f}x"
            if np.isfinite(ratio["torch pipelining"]).any()
            else "fails",
            f"{score:.3f} [{low:.3f}, {high:.3f}]",
        )
        console.print(f"{name}: done")
    console.print(table)


if __name__ == "__main__":
    main()
