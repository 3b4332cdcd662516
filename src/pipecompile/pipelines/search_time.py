"""The seconds a planner may take, where it makes several plans to choose from."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

#: What a search gets at the least: its dynamic programs have found a plan by then, however wide the graph.
LEAST_SECONDS = 0.5
#: A plan is searched for once more where its stages, measured, are not as predicted.
_SEARCHES = 2


@dataclass
class SearchTime:
    """``seconds`` left for ``plans`` yet to be made. What one does not use is for the ones after it."""

    seconds: float
    plans: int = 1

    def __post_init__(self) -> None:
        self._least = min(LEAST_SECONDS, self.seconds)

    def share(self) -> float:
        """Begin the next plan: how long each of its searches may take."""
        each = self.seconds / max(self.plans, 1) / _SEARCHES
        self.plans -= 1
        return max(each, self._least)

    @contextmanager
    def running(self) -> Generator[None]:
        """Count what a search takes."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds = max(self.seconds - (time.monotonic() - begun), self._least)


__all__ = ["LEAST_SECONDS", "SearchTime"]
