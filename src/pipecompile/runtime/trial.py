"""Which of several packages is faster? They stream the example in real workers, in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from pipecompile.ir.package import Package
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.session import Session

#: Turns of each package at most, and those after which a clear lead ends the trial.
TURNS, CLEAR = 11, 5

#: A package leads clearly where it was faster by this factor or more in every turn but one at most.
LEAD = 1.03

#: Results each gives at least in a turn besides those that fill it.
FEWEST = 16


def stream_rates(
    packages: Sequence[Package],
    tensors: Mapping[str, torch.Tensor],
    leaves: Sequence[Any],
    seconds: float = 0.4,
    budget: float = 12.0,
) -> list[float]:
    """Samples a second of each package in steady state, in some turns of about ``seconds`` each.

    All of them are started before the first turn; see :func:`in_turns` for what follows. ``tensors`` stay as
    they are: the workers compute on copies.

    Raises:
        PipelineError: if a worker does not start or is lost.
        PipecompileError: if the weights cannot be shared.
    """
    private = apart(tensors)
    with ExitStack() as stack:
        sessions: list[Session] = []
        for package in packages:
            sessions.append(Session(package, private))
            stack.callback(sessions[-1].close)
        rounds = [math.lcm(*(len(stage.devices) for stage in package.plan.stages)) for package in packages]
        for session in sessions:  # the first samples of a worker are slow
            _rate(session, leaves, 0.0, 1)
        return in_turns(
            [partial(_rate, session, leaves, seconds, each) for session, each in zip(sessions, rounds, strict=True)],
            budget,
        )


def in_turns(rates: Sequence[Callable[[], float]], budget: float) -> list[float]:
    """Rates that are measured in turns, until one leads all others clearly or ``budget`` seconds are over.

    Every second turn goes backwards, so that a change of the machine's speed meets all alike. They are compared
    within each turn: returned are the median of the first one, and the others by the median of their ratios to it.
    """
    found, begun = list[list[float]](), time.perf_counter()
    for turn in range(TURNS):
        own = [0.0] * len(rates)
        for i in range(len(rates)) if turn % 2 == 0 else reversed(range(len(rates))):
            own[i] = rates[i]()
        found.append(own)
        if time.perf_counter() - begun > budget or (turn + 1 >= CLEAR and leads(found)):
            break
    first = statistics.median(own[0] for own in found)
    return [first * statistics.median(own[i] / own[0] for own in found) for i in range(len(rates))]


def leads(turns: Sequence[Sequence[float]]) -> bool:
    """Whether one was faster than every other by ``LEAD`` in every turn but one at most."""

    def ahead(one: int) -> bool:
        others = [rates[:one] + rates[one + 1 :] for rates in map(list, turns)]
        return sum(rates[one] < LEAD * max(rest) for rates, rest in zip(turns, others, strict=True) if rest) <= 1

    return any(ahead(one) for one in range(len(turns[0])))


def _rate(session: Executor, leaves: Sequence[Any], seconds: float, round: int) -> float:
    """Submit as fast as there is room, for so long; the rate of results while the pipeline was full.

    Results of replicas come in bursts, so whole rounds (of ``round`` samples) are counted.
    """
    submitted, arrivals, full = 0, list[float](), 0
    stop = time.perf_counter() + seconds
    while True:
        more = time.perf_counter() < stop or submitted < 2 * full + FEWEST * round
        while more and session.submit(leaves) is not None:
            submitted += 1
        full = full or session.in_flight
        if not more and not session.in_flight:
            break
        session.turn(room=more)
        while session.poll() is not None:
            arrivals.append(time.perf_counter())
    steady = arrivals[full - 1 : len(arrivals) - full]
    count = (len(steady) - 1) // round * round
    return count / max(steady[count] - steady[0], 1e-9)


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that share storages among themselves as the originals do, for as long as the trial lasts."""
    storages: dict[int, torch.UntypedStorage] = {}
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        copy = storages.setdefault(storage.data_ptr(), storage.clone())
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())
        found[name] = view.requires_grad_(tensor.requires_grad)
    return found


__all__ = ["apart", "in_turns", "leads", "stream_rates"]
