"""Which of several training steps is faster? They train on the example batch in real workers, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.ir.tree import flatten
from pipecompile.runtime.process_step import ProcessTrainer
from pipecompile.runtime.training import Training
from pipecompile.runtime.trial import apart, in_turns

#: Steps in a turn at the least.
_FEWEST = 2


def step_seconds(
    steps: Sequence[tuple[StepPackage, Mapping[str, torch.Tensor]]],
    training: Training,
    requests: Sequence[StepRequest],
    seconds: float,
    budget: float,
) -> list[float]:
    """Seconds of a step of each, of turns of about ``seconds`` each, for about ``budget`` seconds in all.

    Workers of all are there from the first turn to the last. The tensors stay as they are: the workers train copies.

    Raises:
        PipecompileError: if workers do not start, or a step fails.
    """
    with ExitStack() as stack:
        trainers: list[ProcessTrainer] = []
        for step, tensors in steps:
            trainers.append(ProcessTrainer(step, apart(tensors), training))
            stack.callback(trainers[-1].close)
        for trainer, request in zip(trainers, requests, strict=True):
            trainer.step(request)  # the first step of a worker is slow
        pairs = zip(trainers, requests, strict=True)
        return [1 / rate for rate in in_turns([partial(_rate, *pair, seconds) for pair in pairs], budget)]


def _rate(trainer: ProcessTrainer, request: StepRequest, seconds: float) -> float:
    """Steps a second, from the median one, so that a single disturbed one does not count."""
    times, stop = list[float](), time.perf_counter() + seconds
    while len(times) < _FEWEST or time.perf_counter() < stop:
        begin = time.perf_counter()
        trainer.step(request)
        times.append(time.perf_counter() - begin)
    return 1 / statistics.median(times)


def free_memory() -> int:
    """Bytes that new processes may use without driving others out, as the kernel estimates (man 5 proc_meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return int(kilobytes) * 1024


class ResultLoss:
    """Stands for a loss whose targets are not known: the sum of all results that have gradients."""

    def __call__(self, result: Any, _target: Any) -> torch.Tensor:
        """A scalar."""
        return total(flatten(result)[0])


def total(outputs: Sequence[Any]) -> torch.Tensor:
    """The sum of all of a model's flat results that have gradients."""
    return torch.stack([x.double().sum() for x in outputs if isinstance(x, torch.Tensor) and x.requires_grad]).sum()


__all__ = ["ResultLoss", "free_memory", "step_seconds", "total"]
