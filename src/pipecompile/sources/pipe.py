"""Read a named pipe such that a reader who has had enough is not left waiting for its writer."""

from __future__ import annotations

import os
import select
import threading

#: How often the end of interest is looked for while the writer is silent, in milliseconds.
_LOOK = 50


class PipeReader:
    """A file object (what PyAV needs of one) over a named pipe; ends when ``stop`` is set."""

    def __init__(self, path: str, stop: threading.Event) -> None:
        self._stop = stop
        # Opening a pipe to read waits for a writer unless told not to; reads are polled for anyway.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)
        self._begun = False

    def read(self, size: int) -> bytes:
        """At most ``size`` bytes; none at the end, when every writer has closed it."""
        while not self._stop.is_set():
            for _, event in self._poll.poll(_LOOK):
                if event & select.POLLIN:
                    try:
                        data = os.read(self._fd, size)
                    except BlockingIOError:
                        continue
                    self._begun = True
                    return data
                if self._begun:
                    return b""
                # Hung up before anything came: the writer has yet to open it.
                self._stop.wait(_LOOK / 1000)
        return b""

    def close(self) -> None:
        """Close the pipe; PyAV calls this with the container."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()
