"""How a pass asks for a measurement. The runtime implements it, the driver injects it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipecompile.ir.cluster import Link


@dataclass(frozen=True)
class Job:
    """A function of a generated module, by name, and what to call it with."""

    source: str
    function: str
    arguments: Sequence[Any]


class Measure(Protocol):
    """Timings on the device a plan is made for. All results are seconds (medians)."""

    def layers(
        self, source: str, arguments: Sequence[Any], marks: int, budget: float
    ) -> tuple[list[float], float, int]:
        """Run a generated module's ``model(clock, *arguments)`` repeatedly for about ``budget`` seconds.

        ``clock(i)`` is called after layer ``i`` of ``marks``. Returns the median of each layer's
        time in its place, the median of the whole, and the number of repeats.
        """
        ...

    def functions(self, jobs: Sequence[Job], budget: float) -> list[float]:
        """Median time of each job, for about ``budget`` seconds each.

        The jobs take turns of many runs: while a turn lasts a job has the caches to itself, as a
        stage on its own device has; a change of the machine's speed meets all of them alike.
        """
        ...

    def link(self) -> Link:
        """Latency and bandwidth of the channel between two devices, as busy time of one end."""
        ...
