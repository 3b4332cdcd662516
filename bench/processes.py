"""Eager PyTorch in processes of its own, pinned, to measure against."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from types import TracebackType

import torch

from bench.models import build


class EagerProcess:
    """A process that runs one model eagerly on given cores and threads, for a given time, on request."""

    def __init__(self, model: str, cores: list[int], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, model, cores, threads), daemon=True)
        self._process.start()
        child.close()
        self._pipe.recv()

    def begin(self, seconds: float) -> None:
        """Start running, without waiting."""
        self._pipe.send(seconds)

    def rate(self) -> float:
        """Samples a second of the run begun last."""
        return self._pipe.recv()

    def run(self, seconds: float) -> float:
        """Samples a second over about that many seconds."""
        self.begin(seconds)
        return self.rate()

    def __enter__(self) -> EagerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.send(None)
        self._process.join(10)


def _serve(pipe: Connection, name: str, cores: list[int], threads: int) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(False)
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
