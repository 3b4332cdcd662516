"""What happens to samples that come five times too fast, under every policy?

    python -m bench.overload [--samples 2000] [--factor 5]

The control is the same pipeline, in the same run, asked for one result after the other (``block``
without a pace): its rate says how fast five times too fast is. The slowest stage is the one
measured on the very samples whose age is reported; the bound for ``latest`` is (stages + 1) times
that. The bound knows the median of a stage; its 99th percentile, beside it, tells how the machine's
own pauses go into the age.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
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


def measure(name: str, model: nn.Module, example: torch.Tensor, samples: int, factor: float, table: Table) -> None:
    """One row a policy."""
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
                name,
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
                "exact" if balance else "WRONG",
            )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--factor", type=float, default=5.0)
    options = parser.parse_args()
    table = Table(title=f"a source {options.factor:g} times too fast, torch {torch.__version__}, 2 cores")
    for title in (
        *("model", "policy", "unpaced rate", "offered", "delivered", "dropped", "median age", "p99 age"),
        *("slowest stage", "its p99", "(stages + 1) x slowest", "account"),
    ):
        table.add_column(title)
    measure("linear 1024x8, 16 rows", chain(1024, 8), torch.randn(16, 1024), options.samples, options.factor, table)
    measure("linear 1024x24, 16 rows", chain(1024, 24), torch.randn(16, 1024), options.samples, options.factor, table)
    Console(width=190).print(table)


if __name__ == "__main__":
    main()
