"""The process of one CPU device: ``python -P -m pipecompile.runtime.worker --fd N``.

Everything it needs comes over the control socket ``N``. It ends when its stream ends, when its
module raises, and when the other side of the socket or the parent process is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

from pipecompile.runtime.control import receive, send


def main() -> NoReturn:
    """Read the boot message, run the device module, leave."""
    # The caller decides what an interrupt means; workers go when the caller closes them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    control = socket.socket(fileno=parser.parse_args().fd)
    boot = receive(control)
    if boot is None:
        os._exit(0)
    threading.Thread(target=_watch, args=(control, boot["parent"]), daemon=True).start()
    _leave(_serve(control, boot))


def _serve(control: socket.socket, boot: dict[str, Any]) -> int:
    try:
        # The core is chosen before torch counts the processors it may use.
        if boot["core"] is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {boot["core"]})
        from pipecompile.runtime.device import run

        failure = run(boot, lambda: send(control, {"kind": "ready"}))
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        failure = {"kind": "startup", "message": message, "trace": traceback.format_exc()}
    if failure is None:
        return 0
    with contextlib.suppress(OSError):
        send(control, failure)
    return 1


def _watch(control: socket.socket, parent: int) -> None:
    """Leave at once when told to, or when the parent is gone; works while the main thread hangs.

    The parent's process is watched as well as its socket: a child it forked may hold a copy of
    the socket open.
    """
    poller = select.poll()
    poller.register(control, select.POLLIN)
    with contextlib.suppress(OSError):
        poller.register(os.pidfd_open(parent), select.POLLIN)
    if os.getppid() == parent:
        poller.poll()
    os._exit(0)


def _leave(code: int) -> NoReturn:
    # Taking torch down in order takes longer than the parent should have to wait.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
