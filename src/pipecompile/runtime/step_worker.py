"""The process of one device in training: ``python -P -m pipecompile.runtime.step_worker``, or a fork.

It answers commands, one at a time: a training step, the state of its optimizers, new settings. It
ends when its caller closes the control socket or is gone, also while it waits for another device.
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

from pipecompile.runtime.lifeline import die_with, watch


def main(arguments: Sequence[str] | None = None, owner: int | None = None) -> NoReturn:
    """Read the boot message, then serve commands until told to leave.

    ``owner`` is the pidfd of the process to live with; by default that is the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what an interrupt means
    parser = argparse.ArgumentParser()
    for name in ("control", "commands", "parent", "core"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args(arguments)
    control, commands = socket.socket(fileno=options.control), socket.socket(fileno=options.commands)
    if owner is None:
        owner = die_with(options.parent)
    threading.Thread(target=watch, args=(control, owner), daemon=True).start()
    if options.core >= 0:  # before torch counts the processors it may use
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {options.core})
    from pipecompile.runtime import pickled

    try:
        device = pickled.receive(commands).device(commands)
    except EOFError:
        os._exit(0)
    except BaseException as error:
        _leave(commands, f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
    pickled.send(commands, ("ready",))
    while True:
        try:
            message = pickled.receive(commands)
        except EOFError:
            os._exit(0)
        answer: Any = device.answer(message)
        pickled.send(commands, answer)


def _leave(commands: socket.socket, text: str) -> NoReturn:
    from pipecompile.runtime import pickled

    with contextlib.suppress(OSError):
        pickled.send(commands, ("startup", text))
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
