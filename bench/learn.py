"""How fast is learning on a stream, against everything else two cores can do with the same model?

    python -m bench.learn [--rounds 10] [--seconds 1.0] [--models "A ..." ...] [--emulate 2 4 8]

The networks are PARTIME's experiments A, B and D (Meloni et al. 2022) at sizes for two cores: 30
convolutions of full resolution; 300 with pooling; a ResNet that learns from a sliding batch. All
candidates take turns in every round. The control is two independent one-thread copies, each
learning sample by sample, against one: what this machine's two cores are worth in that minute.
Reported is speed-up / (control x balance), with a bootstrap interval.

With ``--emulate`` the layers of A (at 64 pixels) are replaced by waits as long as they were measured to take, and
the chain runs on so many devices through the real modules and channels; the limit is the time of
all layers by that of the slowest stage.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise, product
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import pipecompile
from bench.emulated import WIDTH, Waiting, lengths
from bench.models import _resnet
from bench.processes import _Pinned, _prepare
from bench.stream import bootstrap
from bench.train import _Head

ADAM = partial(torch.optim.Adam, lr=1e-4)
RULES = ["sync", "weight_stashing", "2bw", "stale", "sideways"]
Lesson = tuple[nn.Module, Tensor, Tensor, Callable[..., Tensor]]


def squares(output: Tensor, target: Tensor) -> Tensor:
    """PARTIME's loss, mean(output^2); the target is there because a sample without one is not learned from."""
    return (output - target).square().mean()


def convolutions(layers: int, width: int, kernel: int, pool: int = 0) -> nn.Sequential:
    """Layers of convolution and ReLU; a pooling after every ``pool`` of them."""
    found: list[nn.Module] = []
    for i in range(layers):
        parts: list[nn.Module] = [nn.Conv2d(3 if i == 0 else width, width, kernel, padding=kernel // 2), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if pool and (i + 1) % pool == 0 else []
        found.append(nn.Sequential(*parts))
    return nn.Sequential(*found, *([nn.AdaptiveAvgPool2d(1)] if pool else []))


MODELS: dict[str, Callable[[], Lesson]] = {
    "A: 30 conv 5x5, 32 wide, 16px": lambda: (
        convolutions(30, 32, 5), torch.randn(1, 3, 16, 16), torch.zeros(()), squares,
    ),
    "B: 300 conv 3x3, 8 wide, 64px, pooled": lambda: (
        convolutions(300, 8, 3, 50), torch.randn(1, 3, 64, 64), torch.zeros(()), squares,
    ),
    "D: resnet18, batch of 16, 32px": lambda: (
        _Head(_resnet()[0]), torch.randn(16, 3, 32, 32), torch.randint(2, (16,)), nn.functional.cross_entropy,
    ),
}  # fmt: skip


def build(name: str) -> Lesson:
    """The model in train mode with fixed random weights, one sample and its target."""
    torch.manual_seed(0)
    model, x, y, loss_fn = MODELS[name]()
    return model.train(), x, y, loss_fn


class EagerLearning(_Pinned):
    """Learns sample by sample, eagerly, on given cores and threads: samples a second."""

    def __init__(self, name: str, cores: list[int], threads: int) -> None:
        super().__init__(_serve, name, cores, threads)


def _serve(pipe: Connection, name: str, cores: list[int], threads: int) -> None:
    _prepare(cores, threads)
    step = sequential(*build(name))
    step()
    pipe.send("ready")
    while (seconds := pipe.recv()) is not None:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            step()
            count += 1
        pipe.send(count / (time.perf_counter() - start))


def sequential(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> Callable[[], None]:
    """One sample of plain online learning."""
    optimizer = ADAM(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def compiled(lesson: Lesson, rule: Any, devices: int, **more: Any) -> Any:
    """A pipeline that learns."""
    model, x, y, loss_fn = lesson
    return pipecompile.compile(
        model, (x,), mode="learn", loss_fn=loss_fn, optimizer=ADAM, updates=rule, devices=devices, example_targets=y,
        **more,
    )  # fmt: skip


def learning_rate(pipe: Any, x: Tensor, y: Tensor, seconds: float) -> float:
    """Samples a second in steady state: filling and draining are left out."""
    stop = time.perf_counter() + seconds
    skip, arrivals = 2 * len(pipe.plan.stages), list[float]()

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        while time.perf_counter() < stop or len(arrivals) < skip + 4:
            yield x, y

    for _ in pipe.learn(samples()):
        arrivals.append(time.perf_counter())
    steady = [at for at in arrivals[skip:] if at <= stop]
    steady = steady if len(steady) > 3 else arrivals[skip:]
    return (len(steady) - 1) / (steady[-1] - steady[0])


def balance(pipe: Any) -> float:
    """(total / stages) / slowest stage, as measured when compiling: forward, backward and update."""
    loads = [cost.forward + cost.backward + cost.update for cost in pipe.costs]
    return sum(loads) / len(loads) / max(loads)


def measure(
    name: str, rounds: int, seconds: float, rules: list[str], progress: Progress
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Pipelines by name, and the rates of every candidate, one entry a round."""
    torch.set_num_threads(1)
    rates: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        task = progress.add_task(f"{name}: compiling", total=rounds)
        pipes = {"1 stage": stack.enter_context(compiled(build(name), "weight_stashing", 1))}
        pipes.update({rule: stack.enter_context(compiled(build(name), rule, 2)) for rule in rules})
        _, x, y, _ = build(name)
        for pipe in pipes.values():
            learning_rate(pipe, x, y, 0.2)
        first, second = (stack.enter_context(EagerLearning(name, [core], 1)) for core in (0, 1))
        both = stack.enter_context(EagerLearning(name, [0, 1], 2))
        for _ in range(rounds):
            progress.update(task, advance=1, description=name)
            rates["eager, 1 thread"].append(first.run(seconds))
            first.begin(seconds)
            second.begin(seconds)
            rates["two replicas"].append(first.rate() + second.rate())
            for way, pipe in pipes.items():
                rates[way].append(learning_rate(pipe, x, y, seconds))
            rates["eager, 2 threads"].append(both.run(seconds))
    return pipes, rates


def report(name: str, pipes: dict[str, Any], rates: dict[str, list[float]]) -> Table:
    """One row a candidate."""
    one = np.array(rates["eager, 1 thread"])
    control = np.array(rates["two replicas"]) / one
    table = Table(
        "candidate", "x eager 1t [95%]", "stages, ms", "balance", "r / (control x balance)",
        title=f"{name}: eager 1 thread {1e3 / np.median(one):.1f} ms, control {np.median(control):.2f}x",
    )  # fmt: skip
    for candidate, values in rates.items():
        speed = np.array(values) / one
        row = [candidate, "{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(speed))]
        pipe = pipes.get(candidate)
        if pipe is not None and len(pipe.plan.stages) > 1:
            row.append(", ".join(f"{1e3 * (cost.forward + cost.backward + cost.update):.1f}" for cost in pipe.costs))
            score = bootstrap(speed / (control * balance(pipe)))
            row += [f"{balance(pipe):.3f}", "{:.3f} [{:.3f}, {:.3f}]".format(*score)]
        table.add_row(*row)
    return table


def emulate(devices: list[int], rules: list[str], rounds: int, seconds: float, progress: Progress) -> Table:
    """The layers of A as waits, on as many devices as asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    waits = lengths(convolutions(30, 32, 5), torch.randn(1, 3, 64, 64))

    def lesson() -> Lesson:
        torch.manual_seed(0)
        return nn.Sequential(*(Waiting(*pair) for pair in waits)), torch.randn(1, WIDTH), torch.zeros(()), squares

    step = sequential(*lesson())
    table = Table(
        "devices", "rule", "layers a stage", "total / slowest", "speed-up", "speed-up / limit [least, most]",
        title=f"emulated: {len(waits)} layers, {1e3 * timed(step):.1f} ms a sample on one device",
    )  # fmt: skip
    whole = [str(i) for i in range(len(waits))]  # a module is one layer
    task = progress.add_task("emulated", total=len(devices) * len(rules))
    for count, rule in product(devices, rules):
        _, x, y, _ = lesson()
        with compiled(lesson(), rule, count, imports=["bench.emulated"], leaf=whole, profile_seconds=0.5) as pipe:
            sizes = [len(stage.layers) for stage in pipe.plan.stages]
            ends = np.cumsum([0, *sizes])
            loads = [sum(map(sum, waits[a:b])) for a, b in pairwise(ends)]
            limit = sum(loads) / max(loads)
            learning_rate(pipe, x, y, 0.1)
            speeds = [timed(step) * learning_rate(pipe, x, y, seconds) for _ in range(rounds)]
        middle, least, most = (choose(speeds) for choose in (statistics.median, min, max))
        table.add_row(
            str(count), rule, "+".join(map(str, sizes)), f"{limit:.2f}", f"{middle:.2f}x",
            f"{middle / limit:.3f} [{least / limit:.3f}, {most / limit:.3f}]",
        )  # fmt: skip
        progress.advance(task)
    return table


def timed(step: Callable[[], None], repeats: int = 4) -> float:
    """Median seconds of a step."""
    times = list[float]()
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    """Print one table a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="their names, or the letters they begin with")
    parser.add_argument("--rules", nargs="*", default=["sync", "weight_stashing", "stale", "sideways"], choices=RULES)
    parser.add_argument("--emulate", nargs="*", type=int, default=[2, 4, 8])
    options = parser.parse_args()
    console = Console(width=130)
    console.print(
        f"{time.strftime('%Y-%m-%d')}  torch {torch.__version__}  {platform.machine()}  {os.cpu_count()} cores"
    )
    warnings.simplefilter("ignore", pipecompile.PipecompileWarning)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in MODELS:
            if any(name.startswith(wanted) for wanted in options.models):
                console.print(report(name, *measure(name, options.rounds, options.seconds, options.rules, progress)))
        if options.emulate:
            rules = [rule for rule in options.rules if rule != "sync"]
            console.print(emulate(options.emulate, rules, options.rounds, options.seconds, progress))


if __name__ == "__main__":
    main()
