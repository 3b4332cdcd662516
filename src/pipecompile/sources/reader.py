"""One thread that runs a generator ahead of whoever takes its items."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

#: How long ``close`` waits for a generator that does not come back from a read.
_JOIN_SECONDS = 5.0


class Reader:
    """Hands on the items of ``produce(stop)``, run in a thread of its own.

    At most ``ahead`` items wait: then the thread waits too, or, with ``newest``, the oldest is
    thrown away and counted in ``skipped``. An exception of the generator is raised where its next
    item would have been taken. The thread ends with the generator, with ``close()``, or when the
    reader is dropped; it closes the generator in each case.
    """

    def __init__(
        self, produce: Callable[[threading.Event], Generator[Any]], *, newest: bool = False, ahead: int = 4
    ) -> None:
        self._box = box = _Box(1 if newest else ahead, newest)
        self._thread = threading.Thread(target=_run, args=(box, produce), name="pipecompile-source", daemon=True)
        self._finalizer = weakref.finalize(self, box.end)
        self._thread.start()

    @property
    def skipped(self) -> int:
        """Items thrown away because a newer one came before anybody took them."""
        return self._box.skipped

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Any:
        return self._box.take()

    def close(self) -> None:
        """End the thread and wait for it. May be repeated; a blocked ``next`` in another thread ends."""
        self._box.end()
        if self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()


class _Box:
    """What the thread and the taker share. It must not know the reader, whose end it outlives."""

    def __init__(self, room: int, newest: bool) -> None:
        self.stop = threading.Event()
        self.skipped = 0
        self._room, self._newest = room, newest
        self._items: deque[Any] = deque()
        self._change = threading.Condition()
        self._done = False
        self._error: BaseException | None = None

    def put(self, item: Any) -> bool:
        """Hand on an item; False once nobody wants more."""
        with self._change:
            while len(self._items) >= self._room and not self.stop.is_set():
                if self._newest:
                    self._items.popleft()
                    self.skipped += 1
                else:
                    self._change.wait()
            if self.stop.is_set():
                return False
            self._items.append(item)
            self._change.notify_all()
            return True

    def finish(self, error: BaseException | None) -> None:
        with self._change:
            self._done, self._error = True, error
            self._change.notify_all()

    def take(self) -> Any:
        with self._change:
            # The thread always ends in finish(), so this wait does.
            self._change.wait_for(lambda: self._items or self._done or self.stop.is_set())
            if self._items and not self.stop.is_set():
                item = self._items.popleft()
                self._change.notify_all()
                return item
            error, self._error = self._error, None
            if error is not None and not self.stop.is_set():
                raise error
            raise StopIteration

    def end(self) -> None:
        with self._change:
            self.stop.set()
            self._items.clear()
            self._change.notify_all()


def _run(box: _Box, produce: Callable[[threading.Event], Generator[Any]]) -> None:
    error: BaseException | None = None
    try:
        generator = produce(box.stop)
        try:
            for item in generator:
                if not box.put(item):
                    break
        finally:
            generator.close()
    except BaseException as raised:  # whatever it is, it belongs to the taker, who re-raises it
        error = raised
    box.finish(error)
