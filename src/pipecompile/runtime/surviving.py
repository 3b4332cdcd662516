"""An executor that outlives its workers: what was in flight when one died is computed again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from pipecompile.errors import PipelineError, StageError, WorkerDied, WorkerHung
from pipecompile.ir.timeline import Timeline
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.executor import Executor, ResultTimeout

#: How often the workers may die without one more result before it is held against a sample.
TRIES = 3

#: Samples between two snapshots of the buffers that a model writes to.
SNAPSHOT_EVERY = 32


class Surviving:
    """Implements :class:`~pipecompile.runtime.executor.Executor` over executors it starts one after another.

    A worker that dies or hangs ends its executor. Another one is started and given copies of the
    samples that have no result yet, in order; so each result comes once, and the caller sees no
    more than a pause.

    A model that writes to its buffers would count samples twice that were replayed. So the buffers
    are copied whenever a sample comes in while nothing is in flight, and after 32 samples nothing
    is let in until that is so. At a death they are put back, and every sample since is replayed;
    results delivered before are thrown away. Changes the caller makes to such buffers while
    samples are in flight can be lost.

    Unlike other executors this one is used by one thread at a time (others wait); ``nudge`` by any.

    Args:
        start: starts an executor; the one before is closed by then.
        written: the buffers the model writes to, in the memory the workers share.
        tries: deaths in a row without a new result after which it gives up.
        every: samples from one snapshot of ``written`` to the next.
    """

    def __init__(
        self,
        start: Callable[[], Executor],
        written: Mapping[str, torch.Tensor],
        *,
        tries: int = TRIES,
        every: int = SNAPSHOT_EVERY,
    ) -> None:
        self._start, self._written, self._limit, self._every = start, written, tries, every
        self._lock = threading.RLock()
        self._kept: deque[tuple[int, list[Any]]] = deque()
        """Copies of every sample that a replay would begin with, by number."""
        self._unsent: deque[tuple[int, list[Any]]] = deque()
        """Those of them that the present executor has not been given yet."""
        self._snapshot: dict[str, torch.Tensor] = {}
        self._snapshot_at = 0
        self._base = self._submitted = self._delivered = self._deaths = self.restarts = 0
        self._inner = start()

    @property
    def in_flight(self) -> int:
        """Samples submitted and not yet delivered."""
        return self._submitted - self._delivered

    @property
    def closed(self) -> bool:
        """Whether it was closed or has given up."""
        return self._inner.closed

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the present workers."""
        return getattr(self._inner, "pids", ())

    def submit(self, leaves: Sequence[Any]) -> int | None:
        """Offer a sample; its number, or None while there is no room. See ``Executor.submit``."""
        with self._lock:
            if self._unsent:
                self._resend()
            if self._unsent or self._quiescing:
                return None
            if self._written and not self.in_flight:
                self._snapshot = {name: tensor.detach().clone() for name, tensor in self._written.items()}
                self._snapshot_at = self._submitted
                self._kept.clear()
            if self._inner.submit(leaves) is None:
                return None
            copies = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            self._kept.append((self._submitted, copies))
            self._submitted += 1
            return self._submitted - 1

    @property
    def _quiescing(self) -> bool:
        """Whether what is in flight has to come out first, so that a snapshot can be taken."""
        return bool(self._written) and self.in_flight > 0 and self._submitted - self._snapshot_at >= self._every

    def late(self, on: bool) -> None:
        """Of the executor of now. See ``Executor.late``."""
        self._inner.late(on)

    def wait(self, timeout: float | None = None, *, or_result: bool = True) -> bool:
        """Block until there is room for a sample or a result to take. See ``Executor.wait``."""
        with self._lock:
            if self._quiescing or self._unsent:
                self.turn(timeout, room=bool(self._unsent))
                return not self._quiescing and not self._unsent and self._inner.wait(0.0)
            return self._attempt(lambda: self._inner.wait(timeout, or_result=or_result)) or False

    def turn(self, timeout: float | None = None, *, room: bool = True) -> None:
        """Block until the next result is complete, there is room, or a nudge. See ``Executor.turn``."""
        with self._lock:
            room = (room and not self._quiescing) or bool(self._unsent)
            self._attempt(lambda: self._inner.turn(timeout, room=room))
            self._resend()

    def nudge(self) -> None:
        """Make a ``turn`` in another thread come back early, or else the next one."""
        self._inner.nudge()

    def awake(self) -> AbstractContextManager[None]:
        """Keep the devices of now from sleeping; see ``Executor.awake``."""
        return self._inner.awake()

    def poll(self) -> tuple[int, list[Any]] | None:
        """The next result if it is there, else None."""
        with self._lock:
            self._resend()
            while self.in_flight and self._inner.in_flight:
                deaths = self.restarts
                taken = self._attempt(lambda: self._mine(self._inner.poll))
                if taken is None and self.restarts == deaths:
                    return None
                if taken is not None and (own := self._own(taken)) is not None:
                    return own
            return None

    def result(self, timeout: float | None = None) -> tuple[int, list[Any]]:
        """The next result, in order. See ``Executor.result``."""
        deadline = None if timeout is None else clock() + timeout
        with self._lock:
            if not self.in_flight:
                return self._inner.result(timeout)  # which knows what to say about that
            while True:
                self._resend()
                left = None if deadline is None else max(0.0, deadline - clock())
                if not self._inner.in_flight:
                    # A new worker has yet to offer its first slot.
                    self._attempt(lambda left=left: self._inner.wait(left))
                    if left == 0.0:
                        raise ResultTimeout(f"no result of sample {self._delivered} within {timeout} s")
                    continue
                taken = self._attempt(lambda left=left: self._mine(lambda: self._inner.result(left)))
                if taken is not None and (own := self._own(taken)) is not None:
                    return own

    def seconds(self, sample: int) -> tuple[float, ...]:
        """What each device spent on a sample just delivered. See ``Executor.seconds``."""
        return self._inner.seconds(sample - self._base)

    def detached(self, weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Names of weights that are no longer those the pipeline computes with."""
        return self._inner.detached(weights)

    def timeline(self) -> Timeline:
        """What was measured since the last death."""
        return self._inner.timeline()

    def close(self) -> None:
        """End the present executor. May be repeated."""
        self._inner.close()

    def __enter__(self) -> Surviving:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _mine(self, take: Callable[[], Any]) -> Any:
        """A result under our number. An error of one sample is a result, too."""
        try:
            taken = take()
        except StageError as error:
            error.sample += self._base
            return error.sample, error
        return None if taken is None else (taken[0] + self._base, taken[1])

    def _own(self, taken: tuple[int, Any]) -> tuple[int, list[Any]] | None:
        """The result for the caller; None for one that was delivered before a death."""
        number, outcome = taken
        if number < self._delivered:
            return None
        if number != self._delivered:
            raise PipelineError(f"the result of sample {number} came when that of {self._delivered} was due")
        self._delivered, self._deaths = number + 1, 0
        if not self._written:
            while self._kept and self._kept[0][0] <= number:
                self._kept.popleft()
        if isinstance(outcome, StageError):
            raise outcome
        return number, outcome

    def _resend(self) -> None:
        """Give the present executor what it has not been given yet, as far as there is room."""
        while self._unsent and self._inner.submit(self._unsent[0][1]) is not None:
            self._unsent.popleft()

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Do something that may end in a death; None if it did and another executor is running."""
        try:
            return action()
        except (WorkerDied, WorkerHung) as error:
            self._restart(error)
            return None

    def _restart(self, error: WorkerDied | WorkerHung) -> None:
        while True:
            error.sample += self._base if error.sample >= 0 else 0
            self._deaths += 1
            if self._deaths > self._limit:
                raise type(error)(
                    f"{error}; it was restarted {self._limit} times, and each time the workers ended before "
                    f"sample {self._delivered}, the oldest in flight, had a result",
                    device=error.device,
                    sample=error.sample,
                ) from error
            # Everybody is dead by now, so nobody writes to the buffers but us.
            self._inner.close()
            with torch.no_grad():
                for name, value in self._snapshot.items():
                    self._written[name].copy_(value)
            try:
                # The executor before holds the shared weights until this one does.
                self._inner = self._start()
            except WorkerDied as again:
                error, self._base = again, 0
                continue
            break
        self.restarts += 1
        self._base = self._kept[0][0] if self._kept else self._submitted
        self._unsent = deque(self._kept)
