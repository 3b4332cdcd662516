"""What enters and leaves a stream besides plain values: samples with a time stamp, results with a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """An item of a stream whose presentation time ``pts`` (seconds) travels with it.

    ``value`` is what :meth:`pipecompile.InferencePipeline.stream` takes: a tensor, a tuple of
    positional arguments, or a dict of keyword arguments.
    """

    value: Any
    pts: float | None = None


@dataclass(frozen=True)
class Record:
    """What happened to one sample. Times are ``time.monotonic()`` seconds.

    ``sequence`` counts everything the source gave, dropped samples included. ``offered`` is when
    the sample was handed over, ``entered`` when it was put into the first stage's ring, ``left``
    when its result was taken. ``stages`` are the seconds each stage computed on it, where still on
    record. ``dropped`` is how many samples were dropped between the previous result and this one.
    """

    sequence: int
    pts: float | None
    offered: float
    entered: float
    left: float
    stages: tuple[float, ...] = ()
    dropped: int = 0

    @property
    def latency(self) -> float:
        """Seconds from being offered to the result."""
        return self.left - self.offered


@dataclass(frozen=True)
class Result:
    """A result together with its record."""

    value: Any
    record: Record


@dataclass(frozen=True)
class Counts:
    """Where the samples of a pipeline are, all of one moment.

    ``submitted == delivered + dropped + failed + in_flight``, always. A sample counts as submitted
    when its source has given it, as delivered when the caller gets its result, as dropped when it
    was turned away at the entrance (or when its stream was ended early), as failed when the caller
    gets an exception for it. ``in_flight`` are those at the entrance and inside.
    """

    submitted: int = 0
    delivered: int = 0
    dropped: int = 0
    failed: int = 0
    in_flight: int = 0
