"""What workers say on their control sockets while they run: which sample failed, and that they end."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterable

from pipecompile.errors import PipelineError, StageError
from pipecompile.runtime.channels.ring import clock
from pipecompile.runtime.crew import Crew

#: How long the reason for a failed sample may come after the word of its failure.
_SECONDS = 2.0


class News:
    """Collects what workers say. Any thread may listen; ``end`` is set once a worker has ended.

    ``lock`` is held while sockets are read.
    """

    def __init__(self, crew: Crew) -> None:
        self._crew, self.lock = crew, threading.RLock()
        self.end: PipelineError | None = None
        self._errors: dict[int, StageError] = {}
        self._poller = select.poll()
        for worker in crew.workers:
            self._poller.register(worker.control.fileno(), select.POLLIN)

    def listen(self, fds: Iterable[int], delivered: int) -> None:
        """Take down what is said on these sockets, if still unread; forget samples before ``delivered``."""
        with self.lock:
            # Both sides of a session may have been woken by one message.
            ready = {fd for fd, _ in self._poller.poll(0)}
            for fd in ready.intersection(fds):
                heard = self._crew.hear(fd)
                if isinstance(heard, StageError):
                    self._errors.setdefault(heard.sample, heard)
                elif self.end is None:
                    self.end = heard
            # Stages side by side may both fail a sample; only the first word of it is asked for.
            for sample in [sample for sample in self._errors if sample < delivered - 1]:
                self._errors.pop(sample)

    def reason(self, sample: int) -> PipelineError:
        """Why a sample failed: its worker said so before it passed the word on.

        Any other error than a StageError of that sample means that the workers are lost.
        """
        deadline = clock() + _SECONDS
        while sample not in self._errors:
            if self.end is not None or clock() > deadline:
                return self.end or PipelineError(f"sample {sample} failed, but no device says why", sample=sample)
            self.listen([fd for fd, _ in self._poller.poll(100)], sample + 1)
        return self._errors.pop(sample)
