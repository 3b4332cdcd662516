"""What happens to samples that come five times too fast, under every policy?

    python -m bench.overload [--samples 8000] [--factor 5]

The control is the same pipeline, in the same run, asked for one result after the other (``block``
without a pace): its rate says how fast five times too fast is. The slowest stage is the one
measured on the very samples whose age is reported; the bound for ``latest`` is (stages + 1) times
that. The bound knows the median of a stage; its 99th percentile, beside it, tells how the machine's
own pauses go into the age. What they alone would do is the second control: halves of the model run
side by side in two processes that share nothing, and their times are put together as those of a
pipeline that hands over in no time, whose source and consumer cost nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice, repeat
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pipecompile

POLICIES = ("latest", "drop_oldest", "drop_newest", "block")


class Paced:
    """A live source of one sample every ``period`` seconds, late or not."""

    live = True

    def __init__(self, item: Any, period: float, count: int) -> None:
        self._item, self._period, self._count = item, period, count

    def __iter__(self) -> Iterator[Any]:
        begin = time.perf_counter()
        for k in range(self._count):
            ahead = begin + k * self._period - time.perf_counter()
            if ahead > 0:
                time.sleep(ahead)
            yield self._item


def chain(width: int, layers: int) -> nn.Module:
    """A plain chain of linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))).eval()


def _seconds(core: int, width: int, layers: int, count: int) -> list[float]:
    """How long half of a chain takes, run ``count`` times on a core of its own."""
    os.sched_setaffinity(0, [core])
    torch.set_num_threads(1)
    model, example = chain(width, layers), torch.randn(16, width)
    taken: list[float] = []
    with torch.inference_mode():
        for _ in range(count + 50):
            start = time.perf_counter()
            model(example)
            taken.append(time.perf_counter() - start)
    return taken[50:]


def ideal(width: int, layers: int, factor: float, count: int) -> str:
    """The p99 age of a pipeline made of nothing but two halves that run undisturbed, and its bound."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        halves = [pool.submit(_seconds, core, width, layers // 2, count) for core in range(2)]
        first, second = (np.array(half.result()) for half in halves)
    slowest = float(max(np.median(first), np.median(second)))
    period = slowest / factor
    free, busy, ages = 0.0, 0.0, list[float]()
    for one, two in zip(first, second, strict=True):
        # The newest sample, taken so that it comes to the second stage when that is expected to be free.
        enters = max(free, busy - float(np.median(first)))
        free = enters + one
        busy = max(free, busy) + two
        ages.append(busy - enters // period * period)
    return f"{np.percentile(ages, 99) * 1e3:.2f} of {3e3 * slowest:.2f} ms"


def measure(layers: int, samples: int, factor: float, table: Table) -> None:
    """One row a policy."""
    model, example = chain(1024, layers), torch.randn(16, 1024)
    alone = ideal(1024, layers, factor, samples // 5)
    with pipecompile.compile(model, example, devices=2) as pipe:
        list(pipe.stream(islice(repeat(example), 50)))
        start = time.perf_counter()
        count = sum(1 for _ in pipe.stream(islice(repeat(example), samples // 5)))
        rate = count / (time.perf_counter() - start)
        stages = len(pipe.plan.stages)
        for policy in POLICIES:
            source = Paced(example, 1 / (factor * rate), samples if policy != "block" else samples // 5)
            before, start = pipe.counts, time.perf_counter()
            records = [r.record for r in pipe.stream(source, on_overload=policy, records=True)]  # type: ignore[arg-type]
            seconds, after = time.perf_counter() - start, pipe.counts
            ages = np.array([record.latency for record in records]) * 1e3
            stage_ms = np.array([record.stages for record in records]) * 1e3
            slowest, pauses = (max(np.percentile(stage_ms, q, axis=0)) for q in (50, 99))
            bound = (stages + 1) * slowest
            p99 = float(np.percentile(ages, 99))
            balance = after.submitted == after.delivered + after.dropped + after.failed + after.in_flight
            table.add_row(
                f"linear 1024x{layers}, 16 rows",
                policy,
                f"{rate:.0f}/s",
                f"{after.submitted - before.submitted}",
                f"{len(records) / seconds:.0f}/s",
                f"{after.dropped - before.dropped}",
                f"{np.median(ages):.2f} ms",
                f"{p99:.2f} ms",
                f"{slowest:.2f} ms",
                f"{pauses:.2f} ms",
                ("within" if p99 <= bound else "over") + f" {bound:.2f} ms" if policy == "latest" else "",
                alone if policy == "latest" else "",
                "exact" if balance else "WRONG",
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--factor", type=float, default=5.0)
    options = parser.parse_args()
    table = Table(title=f"a source {options.factor:g} times too fast, torch {torch.__version__}, 2 cores")
    for title in (
        *("model", "policy", "unpaced rate", "offered", "delivered", "dropped", "median age", "p99 age"),
        *("slowest stage", "its p99", "(stages + 1) x slowest", "two free halves", "account"),
    ):
        table.add_column(title)
    for layers in (8, 24):
        measure(layers, options.samples, options.factor, table)
    Console(width=210).print(table)


if __name__ == "__main__":
    main()
