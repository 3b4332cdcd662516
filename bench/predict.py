"""Does the simulator predict what a pipeline does?

    python -m bench.predict [--rounds 4] [--seconds 0.6] [--stages 2 3] [--half] [--models ...]

The prediction is made when the pipeline is compiled, from stages timed alone and side by side in
workers that exchange nothing, and written down before any sample runs through it. The machine is
faster or slower from minute to minute, so both are taken relative to the whole model on one core
while all others idle: predicted period / the generated whole model timed in turns with the stages,
against measured period / the same generated model, in a process that keeps its memory as workers
do, in the same turns. Eager is no such yardstick: it asks the system for its activations anew in
every sample. How much slower that makes it is printed, beside the error by the clock (predicted
seconds against measured ones), the error from stages timed alone, and how much copies of the model
on two cores slow each other down. Three forced cuts of each model (the chosen one and the boundary
moved by an eighth of the layers one way and by a quarter the other, so that no two are alike) are
ranked by both. With ``--half`` a process that only
burns time shares the last core, and the cluster says that its only device has half the speed; which
speed it really had, by the model there against the first core, is printed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import islice, pairwise, repeat
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import pipecompile
from bench.models import MODELS, build
from bench.processes import EagerProcess, StageProcess
from bench.stream import stream_rate
from pipecompile.simulate import simulate


@contextmanager
def burning(core: int, share: float = 0.5) -> Generator[None]:
    """A process that takes a share of a core from whoever else runs there, some milliseconds at a time."""
    context = multiprocessing.get_context("spawn")
    begun = context.Event()
    process = context.Process(target=_burn, args=(core, share, begun), daemon=True)
    process.start()
    try:
        if not begun.wait(60):
            raise TimeoutError("the process that burns time did not start")
        yield
    finally:
        process.kill()
        process.join(5)


def _burn(core: int, share: float, begun: Event) -> None:
    os.sched_setaffinity(0, [core])
    # Ahead of everybody else, where that is allowed: to a fair scheduler, a stage that sleeps between
    # two samples is owed time, so that a rival that only burns would take less than half from it.
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    begun.set()
    begin, burnt = time.perf_counter(), 0.0
    while True:
        time.sleep(0.005)  # shorter turns cost whoever is interrupted more than the time they take
        woken = time.perf_counter()
        now = woken
        while burnt + now - woken < share * (now - begin):
            now = time.perf_counter()
        burnt += now - woken


def half(whole: list[StageProcess], seconds: float) -> float:
    """The share to take from the last core so that it runs the model at half the first core's speed.

    Being interrupted costs the model a little more than the time taken from it.
    """
    with burning(1):
        for process in whole:
            process.begin(2 * seconds)
        (first_core,), (last_core,) = (process.rate() for process in whole)
    return 1 - 0.5 * 0.5 / (first_core / last_core)


def cuts(pipe: Any, share: float) -> dict[str, str]:
    """Every layer pinned, with the boundary moved so that ``share`` of the layers change sides."""
    names, devices = pipe.plan.layer_names, [stage.device for stage in pipe.plan.stages]
    order = [layer for stage in pipe.plan.stages for layer in stage.layers]
    boundary = len(pipe.plan.stages[0].layers)
    moved = max(1, round(abs(share) * len(order)))
    at = min(len(order) - 1, max(1, boundary + (moved if share > 0 else -moved)))
    return {names[layer]: f"cpu:{devices[place >= at]}" for place, layer in enumerate(order)}


def predicted(pipe: Any) -> float:
    """Period of the simulated stream against the time of the whole model."""
    return pipe.simulate(96).period / pipe.plan.total


def predicted_alone(pipe: Any) -> float:
    """The same from stages timed alone."""
    plan = pipe.plan
    stages = tuple(
        replace(stage, measured=stage.measured if stage.alone is None else stage.alone) for stage in plan.stages
    )
    return simulate(pipe.program, replace(plan, stages=stages), plan.cluster.link, 96).period / plan.total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.6)
    parser.add_argument("--stages", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--models", nargs="*", default=list(MODELS)[:6])
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(
        f"period / whole model, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores"
        + (", the last at half speed" if options.half else "")
    )
    errors: list[float] = []
    alone_errors: list[float] = []
    clock_errors: list[float] = []
    loose: list[float] = []
    speeds: list[float] = []
    slowed: list[float] = []
    right = pairs = 0
    for name in options.models:
        model, example = build(name)
        table = Table(name, "predicted", "measured", "error", "error of stages alone", "by the clock")
        with ExitStack() as stack:
            eager = stack.enter_context(EagerProcess(name, [0], 1))
            single = stack.enter_context(pipecompile.compile(model, example, devices=1))
            whole = [stack.enter_context(StageProcess(single, example, core, keeping=True)) for core in (0, 1)]
            pipes: dict[str, Any] = {}
            for stages in options.stages:
                cluster: Any = stages
                if options.half:
                    devices = [pipecompile.Device(f"cpu:{i}", core=0) for i in range(stages)]
                    devices[-1] = pipecompile.Device(f"cpu:{stages - 1}", core=1, speed=0.5)
                    cluster = pipecompile.Cluster(tuple(devices))
                pipes[f"{stages} stages"] = stack.enter_context(pipecompile.compile(model, example, devices=cluster))
            first = next(iter(pipes.values()))
            if len(first.plan.stages) == 2:
                for share in (-1 / 4, 1 / 8):
                    forced = pipecompile.compile(model, example, devices=first.plan.cluster, pin=cuts(first, share))
                    pipes[f"2 stages, boundary moved {share:+.2f}"] = stack.enter_context(forced)
            frozen = {plan: predicted(pipe) for plan, pipe in pipes.items()}
            frozen_alone = {plan: predicted_alone(pipe) for plan, pipe in pipes.items()}
            clock = {plan: pipe.simulate(96).period for plan, pipe in pipes.items()}
            if options.half:
                stack.enter_context(burning(1, half(whole, options.seconds)))
            measured: dict[str, list[float]] = {plan: [] for plan in pipes}
            for pipe in pipes.values():
                list(pipe.stream(islice(repeat(example), 10)))
            periods: dict[str, list[float]] = {plan: [] for plan in pipes}
            for _ in range(options.rounds):
                (alone,) = whole[0].run(options.seconds)
                loose.append(1 / eager.run(options.seconds) / alone)
                for process in whole:
                    process.begin(options.seconds)
                (first_core,), (last_core,) = (process.rate() for process in whole)
                speeds.append(first_core / last_core)
                slowed.append(first_core / alone)
                for plan, pipe in pipes.items():
                    periods[plan].append(1 / stream_rate(pipe, example, options.seconds))
                    measured[plan].append(periods[plan][-1] / alone)
        found = {plan: float(np.median(seen)) for plan, seen in measured.items()}
        for plan in pipes:
            error, other = (said[plan] / found[plan] - 1 for said in (frozen, frozen_alone))
            errors.append(abs(error))
            alone_errors.append(abs(other))
            by_clock = clock[plan] / float(np.median(periods[plan])) - 1
            clock_errors.append(abs(by_clock))
            shown = (frozen[plan], found[plan])
            table.add_row(plan, *(f"{part:.3f}" for part in shown), *(f"{e:+.1%}" for e in (error, other, by_clock)))
        console.print(table)
        two = sorted((plan for plan in pipes if plan.startswith("2")), key=frozen.__getitem__)
        pairs += len(two) - 1
        # Predictions closer than the noise of the measurement rank nothing.
        right += sum(found[a] <= found[b] * 1.02 for a, b in pairwise(two))
    console.print(
        f"error: median {np.median(errors):.1%}, worst {max(errors):.1%} "
        f"({np.median(alone_errors):.1%}, {max(alone_errors):.1%} from stages timed alone, "
        f"{np.median(clock_errors):.1%}, {max(clock_errors):.1%} by the clock); "
        f"{right} of {pairs} neighbouring cuts ranked rightly; "
        f"eager takes {np.median(loose):.2f} [{min(loose):.2f}, {max(loose):.2f}] times as long as the generated "
        f"model; a copy on the other core slows that down {np.median(slowed):.2f} "
        f"[{min(slowed):.2f}, {max(slowed):.2f}] times; "
        f"the last core had {np.median(speeds):.2f} [{min(speeds):.2f}, {max(speeds):.2f}] of the first one's speed"
    )


if __name__ == "__main__":
    main()
