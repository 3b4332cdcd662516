"""Does receiving ahead hide a slow link?

    python -m bench.prefetch [--rounds 6] [--seconds 1.5]

Two stages of a convolution chain; the link between them is slowed down until a transfer takes 0.8
of what a stage computes. With depth 0 the receiver asks for a message only when it needs it, and
period = compute + transfer. With depth 1 or more, transfers happen while both compute, and the
period should be max(compute, transfer). ``compute`` is the period of a pipeline of the same depth
with the link as it is, measured in the same turns: with little slack between them, two stages whose
times vary wait for each other now and then, whatever the link.
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

        def pipeline(ahead: int, throttle: dict[str, pipecompile.Link] | None = None) -> pipecompile.InferencePipeline:
            return stack.enter_context(pipecompile.compile(model, example, devices=2, ahead=ahead, throttle=throttle))

        free = {ahead: pipeline(ahead) for ahead in (0, 1, 2)}
        nbytes = free[2].program.edge("0>1").nbytes
        transfer = SHARE / float(np.median([stream_rate(free[2], example, options.seconds) for _ in range(3)]))
        slow = {ahead: pipeline(ahead, {"0>1": pipecompile.Link(0.0, nbytes / transfer)}) for ahead in free}
        computes: dict[int, list[float]] = {ahead: [] for ahead in free}
        periods: dict[int, list[float]] = {ahead: [] for ahead in free}
        for _ in range(options.rounds):
            for ahead in free:
                computes[ahead].append(1 / stream_rate(free[ahead], example, options.seconds))
                periods[ahead].append(1 / stream_rate(slow[ahead], example, options.seconds))
    table = Table("depth", "compute ms", "transfer ms", "period ms", "expected ms", "expected / measured")
    table.title = f"{MODEL}, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {nbytes / 1e3:.0f} kB a message"
    for ahead in free:
        compute, period = np.array(computes[ahead]), np.array(periods[ahead])
        limit = compute + transfer if ahead == 0 else np.maximum(compute, transfer)
        columns = (np.median(compute), transfer, np.median(period), np.median(limit))
        table.add_row(str(ahead), *(f"{1e3 * value:.2f}" for value in columns), f"{np.median(limit / period):.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
