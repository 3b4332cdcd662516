"""What all sources have in common: time stamps, pace, one thread that reads ahead, a clean end."""

from __future__ import annotations

import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import Any, ClassVar

from pipecompile.errors import InputError
from pipecompile.ir.sample import Sample
from pipecompile.sources.reader import Reader


class Source(ABC):
    """An iterable of :class:`~pipecompile.ir.sample.Sample`; a context manager that ends its readers.

    ``live`` says that the source does not wait: what is not taken in time is gone. A pipeline then
    keeps the latest sample when it is overloaded; otherwise it lets the source wait.
    ``length`` is the number of samples where known. Each iteration reads from the beginning.

    Args:
        realtime: give each sample at its own time, counted from the first, and be ``live``.
    """

    #: Read in a thread: worth it where reading takes time.
    threaded: ClassVar[bool] = True

    def __init__(self, *, realtime: bool = False) -> None:
        self.live = realtime
        self.length: int | None = None
        self._realtime = realtime
        self._readers: weakref.WeakSet[Reader] = weakref.WeakSet()
        self._skipped = 0

    @abstractmethod
    def _read(self, stop: threading.Event) -> Generator[tuple[float, Any]]:
        """Time stamps in seconds and what :meth:`_finish` makes into values. Ends soon after ``stop``."""

    def _finish(self, raw: Any) -> Any:
        """The value of a sample."""
        return raw

    @property
    def skipped(self) -> int:
        """Samples of a live source that a newer one replaced before anybody took them."""
        return self._skipped + sum(reader.skipped for reader in self._readers)

    def __iter__(self) -> Generator[Sample]:
        if not (self.threaded or self.live):
            for pts, raw in self._read(threading.Event()):
                yield Sample(self._finish(raw), pts)
            return
        # A live source decodes everything and finishes only what is taken.
        produce = self._paced if self._realtime else self._read if self.live else _finished(self._read, self._finish)
        reader = Reader(produce, newest=self.live)
        self._readers.add(reader)
        try:
            for pts, raw in reader:
                yield Sample(self._finish(raw) if self.live else raw, pts)
        finally:
            reader.close()
            self._readers.discard(reader)
            self._skipped += reader.skipped

    def close(self) -> None:
        """End every iteration under way, in whatever thread. May be repeated."""
        for reader in tuple(self._readers):
            reader.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _paced(self, stop: threading.Event) -> Generator[tuple[float, Any]]:
        begin: float | None = None
        for pts, raw in self._read(stop):
            begin = time.monotonic() - pts if begin is None else begin
            if stop.wait(max(0.0, begin + pts - time.monotonic())):
                return
            yield pts, raw


def check_rate(rate: float) -> float:
    """A rate in samples a second.

    Raises:
        InputError: unless it is a positive number.
    """
    if not 0 < rate < float("inf"):
        raise InputError(f"rate={rate}: give the number of samples a second, more than 0")
    return rate


def _finished(
    read: Callable[[threading.Event], Generator[tuple[float, Any]]], finish: Callable[[Any], Any]
) -> Callable[[threading.Event], Generator[tuple[float, Any]]]:
    def produce(stop: threading.Event) -> Generator[tuple[float, Any]]:
        for pts, raw in read(stop):
            yield pts, finish(raw)

    return produce
