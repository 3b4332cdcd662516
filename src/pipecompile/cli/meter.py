"""How fast results come, while they come and afterwards."""

from __future__ import annotations

import sys
import time
from array import array
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipecompile.cli.console import counted, ms

if TYPE_CHECKING:
    from pipecompile.ir.sample import Record
    from pipecompile.pipelines.inference import InferencePipeline

_RECENT = 200


class Meter:
    """Counts results and remembers their latencies."""

    def __init__(self) -> None:
        self.latencies = array("d")
        self._first: Record | None = None
        self._last = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT)

    def add(self, record: Record) -> None:
        """A result has come."""
        self._first = record if self._first is None else self._first
        self._last = record.left
        self.latencies.append(record.latency)
        self._recent.append((record.left, record.latency))

    @property
    def seconds(self) -> float:
        """From the first sample being offered to the last result."""
        return 0.0 if self._first is None else self._last - self._first.offered

    @property
    def rate(self) -> float:
        """Results a second after the first, which waited for workers to start and the pipeline to fill."""
        span = 0.0 if self._first is None else self._last - self._first.left
        return (len(self.latencies) - 1) / span if span > 0.0 else 0.0

    def percentile(self, fraction: float) -> float:
        """A latency in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]

    def line(self) -> str:
        """The present, for the terminal."""
        recent = list(self._recent)
        if len(recent) < 2:
            return "waiting for the first results"
        span = time.monotonic() - recent[0][0]
        ordered = sorted(latency for _, latency in recent)
        return (
            f"{len(self.latencies):,} results   {(len(recent) - 1) / span:,.1f} samples/s   latency "
            f"{ms(ordered[len(ordered) // 2])} ms, 99% {ms(ordered[int(0.99 * (len(ordered) - 1))])} ms"
        )

    def summary(self, stages: int) -> str:
        """The whole, in words."""
        if not self.latencies:
            return "no results"
        rate = f": {self.rate:,.1f} samples/s after the first" if self.rate else ""
        words = f"{counted(len(self.latencies), 'sample')} in {self.seconds:.2f} s{rate}, on {counted(stages, 'stage')}"
        parts = [
            f"{name} {ms(self.percentile(fraction))} ms"
            for name, fraction in (("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("longest", 1.0))
        ]
        return f"{words}\nlatency, from being offered to the result: {', '.join(parts)}"


@contextmanager
def live(meter: Meter, pipe: InferencePipeline, *, quiet: bool = False) -> Generator[None]:
    """A line on stderr that follows ``meter``, on a terminal only; with ``quiet`` not where stdout goes there too."""
    if not sys.stderr.isatty() or (quiet and sys.stdout.isatty()):
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    def line() -> Text:
        counts = pipe.counts
        more = "".join(
            f"   {name} {count:,}" for name, count in (("dropped", counts.dropped), ("failed", counts.failed)) if count
        )
        return Text(meter.line() + more)

    # Standard output may be somebody's data: rich must not lead it through the terminal.
    console = Console(stderr=True)
    with Live(get_renderable=line, refresh_per_second=5, transient=True, console=console, redirect_stdout=False):
        yield
