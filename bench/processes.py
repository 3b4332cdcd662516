"""Eager PyTorch, and single stages, in processes of their own, pinned, to measure against."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Generator, Mapping
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch

from bench.models import build
from pipecompile.ir.tree import flatten
from pipecompile.runtime.allocator import ENVIRONMENT


class _Pinned:
    """A process that does one thing over and over for a given time, on request."""

    def __init__(self, serve: Any, *job: Any, keeping: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, *job), daemon=True)
        with _environment(ENVIRONMENT if keeping else {}):
            self._process.start()
        child.close()
        self._pipe.recv()

    def begin(self, seconds: float) -> None:
        """Start running, without waiting."""
        self._pipe.send(seconds)

    def rate(self) -> Any:
        """What the run begun last gave."""
        return self._pipe.recv()

    def run(self, seconds: float) -> Any:
        """Run for about that many seconds."""
        self.begin(seconds)
        return self.rate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.send(None)
        self._process.join(10)


class EagerProcess(_Pinned):
    """Runs one model eagerly on given cores and threads: samples a second."""

    def __init__(self, model: str, cores: list[int], threads: int) -> None:
        super().__init__(_serve_eager, model, cores, threads)


class StageProcess(_Pinned):
    """Runs every stage of a pipeline alone, in turns, on one core: mean seconds of each.

    With ``keeping`` the process keeps freed memory as workers do.
    """

    def __init__(self, pipe: Any, example: tuple[Any, ...], core: int, *, keeping: bool = False) -> None:
        state = {name: tensor.detach().clone() for name, tensor in pipe._engine.state.current().items()}
        leaves = dict(zip(pipe.package.input_names, flatten((example, {}))[0], strict=True))
        edges = [(edge.source, edge.target, edge.values) for edge in pipe.program.edges]
        modules = [(m.source, m.stages[0], m.state) for m in pipe.package.modules]
        super().__init__(_serve_stages, modules, edges, state, leaves, core, keeping=keeping)


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Generator[None]:
    """Variables that a process started meanwhile inherits; the C library reads them when it begins."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _prepare(cores: list[int], threads: int) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(False)


def _serve_eager(pipe: Connection, name: str, cores: list[int], threads: int) -> None:
    _prepare(cores, threads)
    model, example = build(name)
    with torch.no_grad():
        for _ in range(5):
            model(*example)
        pipe.send("ready")
        while (seconds := pipe.recv()) is not None:
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                model(*example)
                count += 1
            pipe.send(count / (time.perf_counter() - start))


def _serve_stages(pipe: Connection, modules: Any, edges: Any, state: Any, values: dict[str, Any], core: int) -> None:
    _prepare([core], 1)
    calls: list[Any] = []
    with torch.no_grad():
        for source, stage, names in modules:
            namespace: dict[str, Any] = {}
            exec(compile(source, f"<stage {stage}>", "exec"), namespace)
            reads = [value for _, target, group in edges if target == stage for value in group]
            makes = dict.fromkeys(value for origin, _, group in edges if origin == stage for value in group)
            call = partial(
                namespace[f"stage_{stage}"], *(state[name] for name in names), *(values[read] for read in reads)
            )
            values.update(zip(makes, call(), strict=True))
            calls.append(call)
        pipe.send("ready")
        while (seconds := pipe.recv()) is not None:
            times: list[float] = []
            for call in calls:
                call()
                count, start = 0, time.perf_counter()
                while time.perf_counter() - start < seconds / len(calls):
                    call()
                    count += 1
                times.append((time.perf_counter() - start) / count)
            pipe.send(times)
