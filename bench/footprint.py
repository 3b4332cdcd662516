"""What does a pipeline cost besides time: latency of one call, idle processor time, memory, compile time?

    python -m bench.footprint [--quick] [--parts latency ...]

Latency is measured in turns with eager on one thread in the same process. Memory is PSS (a shared
page counts once, however many map it) of the caller, its workers and the server they are forked
from; what a model's weights add is the difference to a model with next to no weights, so that
Python and torch cancel out.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pipecompile
from bench.models import MODELS, build
from pipecompile.runtime import nursery


def main() -> None:
    """Print one table a question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and 10,000 instead of 100,000 samples")
    parser.add_argument("--parts", nargs="*", default=["latency", "compiling", "memory", "endurance"])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS), help="for latency")
    options = parser.parse_args()
    quick = options.quick
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(
        f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {platform.machine()}  {os.cpu_count()} cores"
    )
    parts: dict[str, Callable[[], Table]] = {
        "latency": lambda: latency(options.models, 8 if quick else 20),
        "compiling": compiling,
        "memory": memory,
        "endurance": lambda: endurance(10_000 if quick else 100_000),
    }
    for part in options.parts:
        console.print(parts[part]())


def latency(models: Sequence[str], turns: int) -> Table:
    """Median time of a call through an idle pipeline, beside eager; and what idling costs."""
    table = Table(
        "model", "eager ms", "pipe(x) ms", "limit ms", "within", "idle, % of a core", title="one unloaded call"
    )
    for name in models:
        model, example = build(name)
        with pipecompile.compile(model, example, devices=2) as pipe, torch.no_grad():
            calls: tuple[Callable[..., Any], ...] = (model, pipe)
            times: tuple[list[float], ...] = ([], [])
            for _ in range(turns):
                for call, seen in zip(calls, times, strict=True):
                    call(*example)
                    for _ in range(5):
                        begin = time.perf_counter()
                        call(*example)
                        seen.append(time.perf_counter() - begin)
            eager, piped = (float(np.median(seen)) for seen in times)
            pids = [os.getpid(), *pipe._engine.session.pids]
            before, begin = sum(map(busy, pids)), time.perf_counter()
            time.sleep(2.0)
            idle = (sum(map(busy, pids)) - before) / (time.perf_counter() - begin)
        limit = 1.05 * eager + 0.2e-3
        table.add_row(name, ms(eager), ms(piped), ms(limit), "yes" if piped <= limit else "NO", f"{100 * idle:.2f}")
    return table


def compiling() -> Table:
    """Seconds from a module to a pipeline, without a cached profile, and until workers are ready."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model, x = ResNetForImageClassification(ResNetConfig(return_dict=False)).eval(), torch.randn(1, 3, 224, 224)
    begin = time.perf_counter()
    with pipecompile.compile(model, (x,), devices=2, use_cache=False) as pipe:
        compiled = time.perf_counter() - begin
        begin = time.perf_counter()
        pipe(x)
        ready = time.perf_counter() - begin
        solver = pipe.plan.solve_seconds
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pipecompile.cli", "--help"], check=True, capture_output=True)
    shown = time.perf_counter() - begin
    table = Table("what", "seconds", "limit", title="compiling a ResNet-50 of transformers, 224 x 224")
    for what, seconds, limit in (
        ("compile()", compiled, 30),
        ("of which the last solve", solver, 5),
        ("first call: workers started, one sample", ready, 5),
        ("pipecompile --help", shown, 1),
    ):
        table.add_row(what, f"{seconds:.2f}", f"{limit}")
    return table


def memory() -> Table:
    """PSS that 400 MB of weights add to caller and workers together."""
    sizes: list[tuple[int, int]] = []
    for width in (16, 2048):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(24))).eval()
        weights = sum(p.nbytes for p in model.parameters())
        with pipecompile.compile(model, (torch.randn(1, width),), devices=2, use_cache=False) as pipe:
            list(pipe.stream(islice(repeat((torch.randn(1, width),)), 50)))
            sizes.append((weights, sum(map(pss, processes(pipe)))))
        del model, pipe
    (small, little), (large, much) = sizes
    table = Table("weights MB", "PSS of all MB", "copies of the weights", title="memory, all processes")
    table.add_row(f"{small / 1e6:.1f}", f"{little / 1e6:.0f}", "")
    table.add_row(f"{large / 1e6:.1f}", f"{much / 1e6:.0f}", f"{(much - little) / (large - small):.3f}")
    return table


def endurance(samples: int) -> Table:
    """PSS during a long stream of a small model."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), torch.randn(1, 32)
    at = {samples // 10, samples // 2, samples}
    table = Table("samples", "PSS of all MB", "against the first", title=f"a stream of {samples:,} samples")
    seen: list[float] = []
    with pipecompile.compile(model, (x,), devices=2) as pipe:
        for number, _ in enumerate(pipe.stream(items(x, samples)), 1):
            if number in at:
                seen.append(sum(map(pss, processes(pipe))))
                table.add_row(f"{number:,}", f"{seen[-1] / 1e6:.1f}", f"{seen[-1] / seen[0]:.4f}")
    return table


def processes(pipe: Any) -> list[int]:
    """The caller, the workers, and the server that holds torch for them."""
    server = nursery.prepare()
    return [os.getpid(), *pipe._engine.session.pids, *([] if server is None else [server])]


def items(x: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
    for _ in range(count):
        yield x


def busy(pid: int) -> float:
    """Processor seconds of a process so far, all threads."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def pss(pid: int) -> int:
    """Proportional set size in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


if __name__ == "__main__":
    main()
