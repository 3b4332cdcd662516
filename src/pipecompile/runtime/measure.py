"""Timings on this machine for the passes that ask for them."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch

from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.measure import Job
from pipecompile.ir.package import Package
from pipecompile.ir.program import Edge
from pipecompile.runtime.allocator import keeping
from pipecompile.runtime.beside import slowdowns
from pipecompile.runtime.channels.shared_memory import SharedEdge
from pipecompile.runtime.module import execute
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.trial import stream_rates
from pipecompile.runtime.untouched import Untouched

_WARM_UP = 2
_MIN_REPEATS = 3
_TURNS = 5

#: The other end of a measured edge, in a bare interpreter: reads each message once, as a stage would.
_ECHO = """
import mmap, os, signal, sys
signal.alarm(10)
memory, arrivals, credits, start, nbytes, count = map(int, sys.argv[1:])
mapped = memoryview(mmap.mmap(memory, 0))
os.eventfd_write(credits, 1)
while count > 0:
    for _ in range(os.eventfd_read(arrivals)):
        bytes(mapped[start:start + nbytes])
        count -= 1
        os.eventfd_write(credits, 1)
"""


class CpuMeasure:
    """Implements :class:`pipecompile.ir.measure.Measure` in the caller's process, on one core.

    ``core`` is the one to measure on; by default the last this process may use. With several ``threads``
    it is all that this process may use. ``imports`` are modules that
    workers need.
    """

    def __init__(self, core: int | None = None, threads: int = 1, imports: Sequence[str] = ()) -> None:
        self._core, self._threads, self._imports = core, threads, imports

    def layers(
        self, source: str, arguments: Sequence[Any], marks: int, budget: float
    ) -> tuple[list[float], float, int]:
        """Median seconds of each layer in its place, of the whole, and the repeats. See ``Measure``."""
        model = execute(source, "<measured model>")["model"]
        now = time.perf_counter
        stamps = [0.0] * marks

        def clock(layer: int) -> None:
            stamps[layer] = now()

        runs: list[list[float]] = []

        untouched = Untouched(arguments)

        def once() -> float:
            untouched.restore()
            begin = now()
            model(clock, *arguments)
            whole = now() - begin
            runs.append([end - start for start, end in zip([begin, *stamps], stamps, strict=False)])
            return whole

        with self._quiet():
            wholes = _repeat(once, budget)
        untouched.restore()
        timed = runs[-len(wholes) :]
        return (
            [statistics.median(column) for column in zip(*timed, strict=True)],
            statistics.median(wholes),
            len(wholes),
        )

    def functions(self, jobs: Sequence[Job], budget: float) -> list[float]:
        """Seconds of each job. See ``Measure``."""
        untouched = [Untouched(job.arguments) for job in jobs]
        runs = [
            _timed(execute(job.source, "<measured stage>")[job.function], job.arguments, found)
            for job, found in zip(jobs, untouched, strict=True)
        ]
        times: list[list[float]] = [[] for _ in jobs]
        with self._quiet():
            deadline = time.perf_counter() + budget * len(jobs)
            for turn in range(_TURNS):
                if turn and time.perf_counter() > deadline:
                    break
                for once, seen in zip(runs, times, strict=True):
                    seen += _repeat(once, budget / _TURNS)
        for found in untouched:
            found.restore()
        return [_undisturbed(seen) for seen in times]

    def streams(
        self, packages: Sequence[Package], tensors: Mapping[str, torch.Tensor], leaves: Sequence[Any]
    ) -> list[float]:
        """Samples a second of each package in workers. See ``Measure``."""
        return stream_rates(packages, tensors, leaves)

    def slowdowns(self, jobs: Sequence[Job], cores: Sequence[int | None], budget: float) -> list[float]:
        """What jobs that run at once cost each other. See ``Measure``."""
        return slowdowns(jobs, cores, budget, self._imports)

    def link(self) -> Link:
        """Busy time of a sender's end, from messages of 4 KiB and 4 MiB to another process.

        Time on the processor, so that waiting for the other end does not count. Where the
        platform has no shared memory the default link is returned.
        """
        small, large = 1 << 12, 1 << 22
        try:
            with self._quiet():
                low, high = _busy(small, 300), _busy(large, 40)
        except (OSError, TimeoutError, AttributeError):
            return Link()
        slope = max((high - low) / (large - small), 1e-12)
        return Link(latency=max(low - slope * small, 1e-6), bandwidth=1.0 / slope)

    @contextlib.contextmanager
    def _quiet(self) -> Generator[None]:
        """One core (or a thread on each of several), no collections."""
        collecting = gc.isenabled()
        with stage_mode(self._threads), self._pinned(), keeping():
            gc.disable()
            try:
                yield
            finally:
                if collecting:
                    gc.enable()

    @contextlib.contextmanager
    def _pinned(self) -> Generator[None]:
        if not hasattr(os, "sched_getaffinity") or self._threads > 1:
            yield
            return
        before = os.sched_getaffinity(0)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {max(before) if self._core is None else self._core})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)


def _timed(run: Callable[..., Any], arguments: Sequence[Any], untouched: Untouched) -> Callable[[], float]:
    now = time.perf_counter

    def once() -> float:
        untouched.restore()
        begin = now()
        run(*arguments)
        return now() - begin

    return once


def _undisturbed(times: Sequence[float]) -> float:
    """The lower quartile: other work only ever adds to a time, and may do so most of the time."""
    return statistics.quantiles(times, n=4, method="inclusive")[0]


def _repeat(once: Callable[[], float], budget: float) -> list[float]:
    for _ in range(_WARM_UP):
        once()
    deadline = time.perf_counter() + budget
    times: list[float] = []
    while len(times) < _MIN_REPEATS or time.perf_counter() < deadline:
        times.append(once())
    return times


def _busy(nbytes: int, count: int) -> float:
    """Mean processor seconds a sender spends on a message while a second process receives."""
    spec = TensorSpec((nbytes,), "uint8", (1,))
    shared = SharedEdge.create(Edge(0, 1, ("message",), (spec,), 0, 1), {})
    value = torch.ones(nbytes, dtype=torch.uint8)
    start = shared.layout.slot_nbytes - shared.layout.rooms[0]
    warm = count // 10
    numbers = [*shared.fds, start, nbytes, count + warm]
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _ECHO, *map(str, numbers)], pass_fds=shared.fds, stdin=subprocess.DEVNULL
    ) as child:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(child.pid, set(range(os.cpu_count() or 1)) - os.sched_getaffinity(0))
        try:
            return _send(shared, value, warm, count)
        finally:
            child.kill()
            for fd in shared.fds:
                os.close(fd)


def _send(shared: SharedEdge, value: torch.Tensor, warm: int, count: int) -> float:
    sender = shared.sender()
    poller = select.poll()
    poller.register(shared.credits, select.POLLIN)
    busy = 0.0
    for number in range(warm + count):
        if not poller.poll(2000):
            raise TimeoutError
        begin = time.thread_time()
        sender.take()
        sender.put(number, value)
        if number >= warm:
            busy += time.thread_time() - begin
    return busy / count
