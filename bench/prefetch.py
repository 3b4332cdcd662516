"""Does receiving ahead hide a slow link?

    python -m bench.prefetch [--rounds 6] [--seconds 1.5]

Two stages of a convolution chain; the link between them is slowed down until a transfer takes 0.8
of what a stage computes. With depth 0 the receiver asks for a message only when it needs it, and
period = compute + transfer. With depth 1 or more, transfers happen while both compute, and the
period should be max(compute, transfer). ``compute`` is the period of the same pipeline with the
link as it is, measured in the same turns.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pipecompile
from bench.models import build
from bench.stream import stream_rate

MODEL, SHARE = "conv chain 30", 0.8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=1.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, example = build(MODEL)
    with ExitStack() as stack:
        free = stack.enter_context(pipecompile.compile(model, example, devices=2))
        nbytes = free.program.edge("0>1").nbytes
        compute = 1 / np.median([stream_rate(free, example, options.seconds) for _ in range(3)])
        slow = {"0>1": pipecompile.Link(0.0, nbytes / (SHARE * compute))}
        depths = {
            ahead: stack.enter_context(pipecompile.compile(model, example, devices=2, ahead=ahead, throttle=slow))
            for ahead in (0, 1, 2)
        }
        unthrottled: list[float] = []
        periods: dict[int, list[float]] = {ahead: [] for ahead in depths}
        for _ in range(options.rounds):
            unthrottled.append(1 / stream_rate(free, example, options.seconds))
            for ahead, pipe in depths.items():
                periods[ahead].append(1 / stream_rate(pipe, example, options.seconds))
    base = np.array(unthrottled)
    table = Table("depth", "period ms", "of the same minute's compute", "expected", "expected / measured")
    table.title = f"{MODEL}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {nbytes / 1e3:.0f} kB a message"
    transfer = SHARE * compute
    table.add_row("no throttle", f"{1e3 * np.median(base):.2f}", "1.00", "1.00", "")
    for ahead, seen in periods.items():
        period = np.array(seen)
        limit = base + transfer if ahead == 0 else np.maximum(base, transfer)
        table.add_row(
            str(ahead),
            f"{1e3 * np.median(period):.2f}",
            f"{np.median(period / base):.2f}",
            f"{np.median(limit / base):.2f}",
            f"{np.median(limit / period):.3f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
