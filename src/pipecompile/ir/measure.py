"""How a pass asks for a measurement. The runtime implements it, the driver injects it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pipecompile.ir.cluster import Link


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

    def stage(self, source: str, function: str, arguments: Sequence[Any], budget: float) -> float:
        """Median time of one generated stage function, run alone."""
        ...

    def link(self) -> Link:
        """Latency and bandwidth of the channel between two devices, as busy time of one end."""
        ...
