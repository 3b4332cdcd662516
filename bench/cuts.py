"""Is the chosen cut the best one? Run it beside its neighbours.

    python -m bench.cuts [--rounds 6] [--seconds 0.4] [--moves 1 2 4] [--models "resnet18 224px" ...]

Two stages. A neighbour moves the boundary by 1, 2 or 4 layers, either way, by pinning every layer.
Each cut is compiled (some seconds) before the rounds; fewer moves and rounds make it shorter.
All cuts take turns in every round. Reported is the rate of the chosen cut against the fastest one:
the medians of the rounds, and the interval of the ratio by resampling them.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice, repeat

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pipecompile
from bench.models import MODELS, build
from bench.stream import bootstrap, stream_rate


def measure(name: str, rounds: int, seconds: float, offsets: Sequence[int]) -> dict[int, np.ndarray]:
    """Layers by which the boundary was moved -> rates, one a round. 0 is the chosen cut."""
    model, example = build(name)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        chosen = stack.enter_context(pipecompile.compile(model, example, devices=2))
        pipes = {0: chosen}
        names = chosen.plan.layer_names
        order = [names[layer] for stage in chosen.plan.stages for layer in stage.layers]
        cut = len(chosen.plan.stages[0].layers)
        for offset in offsets:
            if 0 < cut + offset < len(order):
                pin = {layer: f"cpu:{int(at >= cut + offset)}" for at, layer in enumerate(order)}
                pipes[offset] = stack.enter_context(pipecompile.compile(model, example, devices=2, pin=pin))
        rates: dict[int, list[float]] = {offset: [] for offset in sorted(pipes)}
        for pipe in pipes.values():
            list(pipe.stream(islice(repeat(example), 10)))
        for _ in range(rounds):
            for offset, seen in rates.items():
                seen.append(stream_rate(pipes[offset], example, seconds))
    return {offset: np.array(seen) for offset, seen in rates.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--moves", type=int, nargs="*", default=[1, 2, 4], help="layers to move the boundary by")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS)[:6])
    options = parser.parse_args()
    offsets = sorted({0} | {sign * abs(move) for move in options.moves for sign in (-1, 1)})
    table = Table("model", *(f"{offset:+d}" if offset else "chosen" for offset in offsets))
    table.add_column("chosen / fastest [95%]")
    table.title = f"samples/s by cut, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"
    for name in options.models:
        rates = measure(name, options.rounds, options.seconds, [o for o in offsets if o])
        best = max(rates, key=lambda offset: float(np.median(rates[offset])))
        ratio, low, high = bootstrap(rates[0] / rates[best])
        cells = [f"{np.median(rates[o]):.1f}" if o in rates else "-" for o in offsets]
        table.add_row(name, *cells, f"{ratio:.3f} [{low:.3f}, {high:.3f}] ({best:+d})")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
