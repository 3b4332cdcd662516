"""Where samples to learn from come from: asked for when there is room, or read at the source's own pace."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from pipecompile.errors import Overloaded
from pipecompile.ir.tree import flatten, unflatten
from pipecompile.streams.entrance import Entrance, Options
from pipecompile.streams.ledger import Entry


class LearnSource(Protocol):
    """Gives numbered items. ``offered`` counts what there was so far, ``dropped`` what was turned away."""

    offered: int
    dropped: int

    def take(self, *, patient: bool) -> tuple[int, Any] | None:
        """The next item, and how many the source gave before it; None if there is none yet (never if ``patient``).

        Raises:
            StopIteration: at the end.
            Exception: what the source raised.
        """
        ...

    def back(self) -> None:
        """The item last taken was none: it does not count."""
        ...

    def close(self) -> None:
        """Take no more; what waits is dropped."""
        ...


class Pulled:
    """Asks for an item when one is wanted. Waits for it, patient or not."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items: Iterator[Any] = iter(items)
        self.offered = self.dropped = 0

    def take(self, *, patient: bool) -> tuple[int, Any] | None:
        """See :class:`LearnSource`."""
        item = next(self._items)
        self.offered += 1
        return self.offered - 1, item

    def back(self) -> None:
        """See :class:`LearnSource`."""
        self.offered -= 1

    def close(self) -> None:
        """See :class:`LearnSource`."""


class Live:
    """Reads the source in a thread at its own pace; what comes too fast is dropped as the policy says.

    An item that waits is copied, target and all, so that the source may use its memory again.
    """

    def __init__(self, items: Iterable[Any], options: Options) -> None:
        self.offered = self.dropped = 0
        self._changed = threading.Condition()
        self._entrance = Entrance(options.on_overload, options.waiting)
        self._policy, self._deadline = options.on_overload, options.deadline
        self._end: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(iter(items),), name="pipecompile-learn", daemon=True)
        self._thread.start()

    def _read(self, items: Iterator[Any]) -> None:
        error: BaseException = StopIteration()
        try:
            for item in items:
                if not self._offer(item):
                    return
        except BaseException as caught:
            error = caught
        with self._changed:
            self._end = error
            self._changed.notify_all()

    def _offer(self, item: Any) -> bool:
        with self._changed:
            if self._closed:
                return False
            now = time.monotonic()
            entry = Entry(self.offered, None, now)
            self.offered += 1
            if self._deadline is not None:
                entry.due = now + self._deadline
            if self._entrance.refuses:
                self.dropped += 1
                raise Overloaded(
                    f"sample {entry.sequence} was refused: {len(self._entrance)} samples wait already "
                    "(on_overload='error')"
                )
            gone = self._entrance.offer(entry)
            self.dropped += len(gone)
            if entry not in gone:
                entry.value = _copied(item)
                self._changed.notify_all()
        return True

    def take(self, *, patient: bool) -> tuple[int, Any] | None:
        """See :class:`LearnSource`."""
        with self._changed:
            while True:
                self.dropped += len(self._entrance.expired(time.monotonic()))
                entry = self._entrance.first()
                if entry is not None:
                    self._entrance.pop()
                    return entry.sequence, entry.value
                if self._end is not None or self._closed:
                    raise self._end or StopIteration
                if not patient:
                    return None
                self._changed.wait()

    def back(self) -> None:
        """See :class:`LearnSource`."""
        self.dropped += 1

    def close(self) -> None:
        """See :class:`LearnSource`. The thread ends with the next item."""
        with self._changed:
            self._closed = True
            self.dropped += len(self._entrance.clear())
            self._changed.notify_all()


def _copied(item: Any) -> Any:
    leaves, tree = flatten(item)
    return unflatten(tree, [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])


__all__ = ["LearnSource", "Live", "Pulled"]
