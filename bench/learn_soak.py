"""Does learning keep its books, and its memory, over hundreds of thousands of samples?

    python -m bench.learn_soak [--samples 300000] [--executors process inline] [--updates weight_stashing]

Every sample carries its number, and so does its target. The loss refuses a target that is another
sample's. One sample in seven has no target, one in a thousand a loss that is infinite. Checked of
every result: its number, that its output is its own sample's, whether it was learned from, and which
version of the weights each stage read, against a count kept here. A second stream, as long, comes
twice as fast as the first went through, and drops what finds no room. Memory is PSS of this process,
its workers and the server they are forked from. The first thing that does not add up ends the program with an error.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import time
import warnings
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import pipecompile
from bench.footprint import pss
from pipecompile.runtime import nursery

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


class Numbered(nn.Module):
    """A small network that hands the number of its sample through."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.back = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """The network's result, and the number."""
        return self.back(self.front(x)), number * 1


class Own(nn.Module):
    """Cross entropy with a sample's own target."""

    def forward(self, result: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The loss, scaled as the target says."""
        output, number = result
        label, own, scale = target
        if int(number) != int(own):
            raise AssertionError(f"sample {int(number)} was given the target of {int(own)}")
        return nn.functional.cross_entropy(output, label) * scale.squeeze()


def samples(first: int, count: int, period: float = 0.0) -> Iterator[tuple[Any, Any]]:
    """Pairs, made as they are asked for, or one every ``period`` seconds."""
    generator = torch.Generator().manual_seed(first)
    pool = [(torch.randn(4, 8, generator=generator), torch.randint(3, (4,), generator=generator)) for _ in range(64)]
    start = time.perf_counter()
    for k in range(first, first + count):
        if period and (early := start + (k - first) * period - time.perf_counter()) > 0:
            time.sleep(early)
        x, label = pool[k % 64]
        number = torch.tensor([k])
        scale = torch.tensor([math.inf if unlearnable(k) else 1.0])
        yield (x, number), None if k % 7 == 3 else (label, number.clone(), scale)


def unlearnable(k: int) -> bool:
    """Whether the loss of a sample is infinite."""
    return k % 1000 == 998


def learned_from(k: int) -> bool:
    """Whether a sample makes an update."""
    return k % 7 != 3 and not unlearnable(k)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=300_000)
    parser.add_argument("--executors", nargs="*", default=["process", "inline"], choices=["process", "inline"])
    parser.add_argument("--updates", default="weight_stashing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", pipecompile.PipecompileWarning)
    console = Console(width=120)
    console.print(
        f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {platform.machine()}  {os.cpu_count()} cores"
    )
    table = Table(
        "executor", "stream", "samples", "delivered", "dropped", "no target", "not finite", "updates",
        "PSS MB after 10 / 50 / 100%", title=f"{options.updates}, 2 stages",
    )  # fmt: skip
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for executor in options.executors:
            for row in soak(executor, options.samples, options.updates, progress):
                table.add_row(executor, *row)
    console.print(table)


def soak(executor: Any, count: int, updates: Any, progress: Progress) -> Iterator[list[str]]:
    """Both streams through one pipeline; a row each."""
    torch.manual_seed(0)
    (x, number), target = next(samples(0, 1))
    pipe = pipecompile.compile(
        Numbered(), (x, number), mode="learn", devices=2, updates=updates, loss_fn=Own(), optimizer=SGD,
        example_targets=target, on_nonfinite="skip", executor=executor, profile_seconds=0.1, hang_seconds=3600.0,
    )  # fmt: skip
    with pipe:
        delays = [pipe.rule.ahead(stage, 2) for stage in range(2)]
        made = delivered = 0
        period = 0.0
        for kind in ("block", "drop_oldest"):
            first, taken, none, skipped, updates_before = pipe.counts.submitted, delivered, 0, 0, made
            before = deque([made], maxlen=1 + max(delays))  # updates before each of the latest samples
            memory: list[float] = []
            marks = {math.ceil(count * share) for share in (0.1, 0.5)}
            last, start = first - 1, time.perf_counter()
            task = progress.add_task(f"{executor}, {kind}", total=count)
            for result in pipe.learn(samples(first, count, period), on_overload=kind):
                k = result.seq
                expect(k > last if kind != "block" else k == last + 1, f"sample {k} came after {last}")
                expect(int(result.output[1]) == k, f"result {k} is that of sample {int(result.output[1])}")
                expect((result.loss is None) == (k % 7 == 3), f"sample {k}: loss {result.loss}")
                expect(result.skipped == (k % 7 != 3 and unlearnable(k)), f"sample {k}: skipped {result.skipped}")
                wanted = tuple(before[max(0, len(before) - 1 - delay)] for delay in delays)
                expect(result.versions == wanted, f"sample {k} read {result.versions}, not {wanted}")
                made, delivered = made + learned_from(k), delivered + 1
                before.append(made)
                none, skipped = none + (result.loss is None), skipped + result.skipped
                if any(last < first + mark <= k for mark in marks):
                    memory.append(resident(pipe))
                progress.update(task, completed=k + 1 - first)
                last = k
            period = (time.perf_counter() - start) / count / 2
            memory.append(resident(pipe))
            counts, out = pipe.counts, delivered - taken
            expect(counts.submitted == first + count, f"{counts} after {first + count} samples")
            expect(counts.delivered == delivered, f"{counts}, {delivered} came out")
            expect(counts.in_flight == 0 and counts.submitted == counts.delivered + counts.dropped, str(counts))
            expect(kind != "block" or out == count, f"{out} of {count} delivered")
            state = pipe.snapshot()
            expect(state["updates"] == made, f"{state['updates']} updates made, {made} learned from")
            yield [
                kind, f"{count:,}", f"{out:,}", f"{count - out:,}", f"{none:,}", f"{skipped:,}",
                f"{made - updates_before:,}", " / ".join(f"{size:.1f}" for size in memory),
            ]  # fmt: skip


def resident(pipe: Any) -> float:
    """MB of this process, the workers, and the server that holds torch for them."""
    server = nursery.prepare()
    workers = getattr(pipe._learner, "pids", ())
    return sum(map(pss, (os.getpid(), *workers, *(() if server is None or not workers else (server,))))) / 1e6


def expect(holds: bool, otherwise: str) -> None:
    """End with an error where the books do not balance."""
    if not holds:
        raise SystemExit(otherwise)


if __name__ == "__main__":
    main()
