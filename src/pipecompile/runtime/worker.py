"""The process of one CPU device: ``python -P -m pipecompile.runtime.worker --fd N --parent PID``, or a fork.

Everything it needs comes over the control socket ``N``. It ends when its stream ends, when its
module raises, and when the other side of the socket or its owner is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from pipecompile.runtime.control import receive, send
from pipecompile.runtime.lifeline import die_with, watch


def main(arguments: Sequence[str] | None = None, owner: int | None = None) -> NoReturn:
    """Read the boot message, run the device module, leave.

    ``owner`` is the pidfd of the process to live with; by default that is the parent.
    """
    # The caller decides what an interrupt means; workers go when the caller closes them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    control = socket.socket(fileno=options.fd)
    if owner is None:
        owner = die_with(options.parent)
    boot = receive(control)
    if boot is None:
        os._exit(0)
    threading.Thread(target=watch, args=(control, owner), daemon=True).start()
    _leave(_serve(control, boot))


def _serve(control: socket.socket, boot: dict[str, Any]) -> int:
    ready = False

    def tell(message: dict[str, Any]) -> None:
        nonlocal ready
        ready = True
        send(control, message)

    try:
        # The core is chosen before torch counts the processors it may use.
        if boot["core"] is not None:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {boot["core"]})
        from pipecompile.runtime.device import run

        run(boot, tell)
        return 0
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
        kind = "broken" if ready else "startup"
        with contextlib.suppress(OSError):
            send(control, {"kind": kind, "message": message, "trace": traceback.format_exc()})
    return 1


def _leave(code: int) -> NoReturn:
    # Taking torch down in order takes longer than the parent should have to wait.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
