"""Timings on a CUDA card, by events: what the card takes, or the host to hand the work over where that is longer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from pipecompile.errors import PipecompileError
from pipecompile.ir.cluster import Link
from pipecompile.ir.measure import Job
from pipecompile.ir.package import Package
from pipecompile.runtime.module import execute
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.untouched import Untouched

_WARM_UP = 3
_MIN_REPEATS = 3


class CudaMeasure:
    """Implements :class:`pipecompile.ir.measure.Measure` on one card, called as torch does."""

    def __init__(self, card: str) -> None:
        self._device = torch.device(card)

    def layers(
        self, source: str, arguments: Sequence[Any], marks: int, budget: float
    ) -> tuple[list[float], float, int]:
        """Median seconds of each layer in its place, of the whole, and the repeats. See ``Measure``."""
        model, untouched = execute(source, "<measured model>")["model"], Untouched(arguments)
        runs: list[list[float]] = []

        def once() -> None:
            untouched.restore()
            events = [self._event()]

            def clock(layer: int) -> None:
                events.append(self._event())

            model(clock, *arguments)
            torch.cuda.synchronize(self._device)
            runs.append([a.elapsed_time(b) / 1e3 for a, b in pairwise(events)])

        with stage_mode(1), torch.cuda.device(self._device):
            _repeat(once, budget)
        untouched.restore()
        timed = runs[_WARM_UP:]
        layers = [statistics.median(column) for column in zip(*timed, strict=True)]
        return layers, statistics.median(map(sum, timed)), len(timed)

    def functions(self, jobs: Sequence[Job], budget: float) -> list[float]:
        """Seconds of each job alone. See ``Measure``."""
        runs = [execute(job.source, "<measured stage>")[job.function] for job in jobs]
        with stage_mode(1), torch.cuda.device(self._device):
            return [
                self._alone(partial(run, *job.arguments), Untouched(job.arguments), budget)
                for run, job in zip(runs, jobs, strict=True)
            ]

    def _alone(self, run: Callable[[], Any], untouched: Untouched, budget: float) -> float:
        times: list[float] = []

        def once() -> None:
            untouched.restore()
            begin = self._event()
            run()
            end = self._event()
            torch.cuda.synchronize(self._device)
            times.append(begin.elapsed_time(end) / 1e3)

        _repeat(once, budget)
        untouched.restore()
        return statistics.median(times[_WARM_UP:])

    def streams(
        self, packages: Sequence[Package], tensors: Mapping[str, torch.Tensor], leaves: Sequence[Any]
    ) -> list[float]:
        """There are no workers on a card."""
        raise PipecompileError(f"streams of samples do not run on {self._device}")

    def slowdowns(self, jobs: Sequence[Job], cores: Sequence[int | None], budget: float) -> list[float]:
        """What jobs on streams of their own cost each other, handed over in turns by one thread. See ``Measure``."""
        runs = [partial(execute(job.source, "<measured device>")[job.function], *job.arguments) for job in jobs]
        untouched = [Untouched(job.arguments) for job in jobs]
        streams = [torch.cuda.Stream(self._device) for _ in jobs]

        def together(chosen: Sequence[int]) -> list[float]:
            for found in untouched:
                found.restore()
            torch.cuda.synchronize(self._device)
            begins = [self._event(streams[i]) for i in chosen]
            for _ in range(_MIN_REPEATS):
                for i in chosen:
                    with torch.cuda.stream(streams[i]):
                        runs[i]()
            ends = [self._event(streams[i]) for i in chosen]
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) / 1e3 for a, b in zip(begins, ends, strict=True)]

        def median(chosen: Sequence[int]) -> list[float]:
            seen: list[list[float]] = []
            _repeat(lambda: seen.append(together(chosen)), budget)
            return [statistics.median(column) for column in zip(*seen[_WARM_UP:], strict=True)]

        with stage_mode(1), torch.cuda.device(self._device):
            alone = [median([i])[0] for i in range(len(jobs))]
            beside = median(list(range(len(jobs))))
        for found in untouched:
            found.restore()
        return [max(both / max(one, 1e-9), 1.0) for one, both in zip(alone, beside, strict=True)]

    def link(self) -> Link:
        """Copies within the card, of 4 KiB and 32 MiB, by a stream of their own: they overlap what is computed."""
        small, large = 1 << 12, 1 << 25
        low, high = (self._copy(nbytes) for nbytes in (small, large))
        slope = max((high - low) / (large - small), 1e-15)
        return Link(latency=max(low - slope * small, 1e-7), bandwidth=1.0 / slope, overlap=1.0)

    def _copy(self, nbytes: int) -> float:
        source = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        target = torch.empty_like(source)
        with torch.cuda.device(self._device):
            return self._alone(partial(target.copy_, source), Untouched(()), 0.02)

    def _event(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        """An event recorded now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream(self._device))
        return event


def _repeat(once: Callable[[], Any], budget: float) -> None:
    for _ in range(_WARM_UP):
        once()
    deadline, count = time.perf_counter() + budget, 0
    while count < _MIN_REPEATS or time.perf_counter() < deadline:
        once()
        count += 1


__all__ = ["CudaMeasure"]
