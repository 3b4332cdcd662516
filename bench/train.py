"""How fast is a training step, against everything else two cores can do with the same model?

    python -m bench.train [--rounds 10] [--seconds 1.0] [--models "resnet18 b16" ...]

All candidates take turns in every round. The control is two independent one-thread copies of the
model, each training on the whole batch, against one: what this machine's two cores are worth in
that minute. The limit of a schedule is control x balance x (1 - bubble); reported is the ratio of
a pipeline's speed-up to it, with a bootstrap interval, and the simulated against the measured time
of a step. Small micro-batches cost more a sample than the whole batch, in any schedule: what they
cost one thread that accumulates their gradients is a candidate too, and one column takes it as
the yardstick in place of the whole batch. Below each table stands what a zero-bubble schedule gains
over 1F1B, round by round, beside what the simulation expects. torch.distributed.pipelining (gloo)
runs on the same two stages; DistributedDataParallel on two halves of the batch.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import pipecompile
from bench.models import _Conv, _mlp, _resnet, _UNet
from bench.processes import _Pinned, _prepare
from bench.stream import bootstrap
from bench.torch_training import DataParallel, TorchPipeline
from pipecompile.simulate.step import bubble

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
PARTS = 4
_FREE = "auto, parts too"
_SMALL = f"eager, 1 thread, {PARTS} parts"
Batch = tuple[nn.Module, torch.Tensor, torch.Tensor]


class _Head(nn.Module):
    """A model's first result, averaged down to ten numbers a sample."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.body(x)
        value = result[0] if isinstance(result, tuple) else result
        return value.flatten(1)[:, :10] if value.dim() < 4 else value.mean((2, 3))


def _gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Model(
        GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=2000, use_cache=False, return_dict=False, **options)
    )


MODELS: dict[str, Callable[[], Batch]] = {
    "resnet18 b16": lambda: (_Head(_resnet()[0]), torch.randn(16, 3, 112, 112), torch.randint(2, (16,))),
    "conv chain 30 b16": lambda: (_Head(_Conv(30, 32)), torch.randn(16, 3, 32, 32), torch.randint(10, (16,))),
    "mlp 16x1024 b256": lambda: (_Head(_mlp(16, 1024)[0]), torch.randn(256, 1024), torch.randint(10, (256,))),
    "unet 64px b16": lambda: (_Head(_UNet()), torch.randn(16, 3, 64, 64), torch.randint(2, (16,))),
    "gpt2 6x256 b16": lambda: (_Head(_gpt()), torch.randint(2000, (16, 64)), torch.randint(10, (16,))),
}


def build(name: str) -> Batch:
    """The model in train mode with fixed random weights, and one batch."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    return model.train(), x, y


class EagerTraining(_Pinned):
    """Trains one model eagerly on given cores and threads, with its batch in so many parts: steps a second."""

    def __init__(self, name: str, cores: list[int], threads: int, parts: int = 1) -> None:
        super().__init__(_serve, name, cores, threads, parts)


def _serve(pipe: Connection, name: str, cores: list[int], threads: int, parts: int) -> None:
    _prepare(cores, threads)
    model, x, y = build(name)
    optimizer, loss_fn = SGD(model.parameters()), nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        for part, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (loss_fn(model(part), target) / parts).backward()
        optimizer.step()

    step()
    pipe.send("ready")
    while (seconds := pipe.recv()) is not None:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            step()
            count += 1
        pipe.send(count / (time.perf_counter() - start))


def pipeline_rate(pipe: Any, x: torch.Tensor, y: torch.Tensor, seconds: float) -> float:
    """Steps a second: from the median step, so that a single disturbed one does not count."""
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times) < 2:
        begin = time.perf_counter()
        pipe.train_step(x, y)
        times.append(time.perf_counter() - begin)
    return 1 / statistics.median(times)


def measure(
    name: str, rounds: int, seconds: float, schedules: list[str]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Pipelines by schedule, and the rates of every candidate, one entry a round."""
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        pipes: dict[str, Any] = {}
        for schedule in schedules:
            model, x, y = build(name)
            pipes[schedule] = stack.enter_context(
                pipecompile.compile(
                    model,
                    x,
                    mode="train",
                    loss_fn=nn.CrossEntropyLoss(),
                    optimizer=SGD,
                    schedule="auto" if schedule == _FREE else schedule,
                    micro_batches="auto" if schedule == _FREE else PARTS,
                    example_targets=y,
                    profile_seconds=1.0,
                )
            )
            pipes[schedule].train_step(x, y)
        peers = {
            "torch 1f1b": stack.enter_context(TorchPipeline(pipes["1f1b"], x, y, "Schedule1F1B", PARTS)),
            "torch gpipe": stack.enter_context(TorchPipeline(pipes["1f1b"], x, y, "ScheduleGPipe", PARTS)),
            "ddp": stack.enter_context(DataParallel(build, name)),
        }
        first, second = (stack.enter_context(EagerTraining(name, [core], 1)) for core in (0, 1))
        both = stack.enter_context(EagerTraining(name, [0, 1], 2))
        small = stack.enter_context(EagerTraining(name, [0], 1, PARTS))
        for _ in range(rounds):
            rates["eager, 1 thread"].append(first.run(seconds))
            first.begin(seconds)
            second.begin(seconds)
            rates["two replicas"].append(first.rate() + second.rate())
            for schedule, pipe in pipes.items():
                rates[schedule].append(pipeline_rate(pipe, x, y, seconds))
            rates["eager, 2 threads"].append(both.run(seconds))
            rates[_SMALL].append(small.run(seconds))
            for peer, process in peers.items():
                rates[peer].append(process.run(seconds))
    return pipes, rates


def _gain(other: str, pipes: dict[str, Any], rates: dict[str, list[float]]) -> str:
    """What another schedule gains over 1F1B, measured within each round, beside the simulated gain."""
    measured = np.array(rates[other]) / np.array(rates["1f1b"]) - 1
    low, middle, high = (100 * float(q) for q in np.percentile(measured, [25, 50, 75]))
    expected = 100 * (pipes["1f1b"].simulate().finishes[0] / pipes[other].simulate().finishes[0] - 1)
    return (
        f"{other} ({pipes[other].program.schedule}) over 1f1b: {middle:+.1f}% (quartiles {low:+.1f}, {high:+.1f}), "
        f"simulated {expected:+.1f}%"
    )


def _chosen(pipe: Any) -> str:
    """What ``auto`` took: a schedule and a number of micro-batches, or one worker with several threads."""
    threads = pipe.plan.cluster.devices[0].threads
    if threads > 1:
        return f"one worker, {threads} threads"
    shared = f", {pipe.plan.data_parallel} pipelines" if pipe.plan.data_parallel > 1 else ""
    return f"{pipe.program.schedule}, {pipe.micro_batches}{shared}"


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--schedules", nargs="*", default=["1f1b", "zb_h1", "auto", _FREE])
    options = parser.parse_args()
    console = Console(width=150)
    console.print(
        f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {platform.machine()}  {os.cpu_count()} cores"
    )
    warnings.simplefilter("ignore", pipecompile.PipecompileWarning)
    for name in options.models:
        pipes, rates = measure(name, options.rounds, options.seconds, options.schedules)
        one = np.array(rates["eager, 1 thread"])
        control = np.array(rates["two replicas"]) / one
        table = Table(
            "candidate", "x eager 1t [95%]", "balance", "bubble",
            "r/(control x balance x (1-bubble))", "same, of parts", "sim/measured",
            title=f"{name}: eager 1 thread {1e3 / np.median(one):.1f} ms a step, control {np.median(control):.2f}x",
        )  # fmt: skip
        for candidate, values in rates.items():
            speed = np.array(values) / one
            cells = [f"{b:.2f}" for b in bootstrap(speed)] if np.isfinite(speed).all() else ["fails", "", ""]
            row = [candidate, f"{cells[0]} [{cells[1]}, {cells[2]}]" if cells[1] else "fails"]
            if candidate in pipes:
                pipe = pipes[candidate]
                simulated = pipe.simulate()
                idle = bubble(simulated)
                loads = [0.0] * len(pipe.plan.cluster.devices)
                for stage in pipe.plan.stages:
                    loads[stage.device] += stage.measured or stage.seconds
                balance = sum(loads) / len(loads) / max(loads)
                # the simulated bubble holds the imbalance already; the schedule's own is at equal stages
                own = 1 - (1 - idle) / balance
                limit = control * balance * (1 - own)
                score = [f"{b:.3f}" for b in bootstrap(speed / limit)]
                parts = [f"{b:.3f}" for b in bootstrap(np.array(values) / np.array(rates[_SMALL]) / limit)]
                ratio = simulated.finishes[0] * float(np.median(values))
                row[0] += f" ({_chosen(pipe)})" if candidate.startswith("auto") else ""
                row += [f"{balance:.3f}", f"{own:.3f}", f"{score[0]} [{score[1]}, {score[2]}]"]
                row += [f"{parts[0]} [{parts[1]}, {parts[2]}]", f"{ratio:.2f}"]
            table.add_row(*row)
        console.print(table)
        for other in (s for s in pipes if s != "1f1b" and "1f1b" in pipes):
            console.print(_gain(other, pipes, rates))


if __name__ == "__main__":
    main()
