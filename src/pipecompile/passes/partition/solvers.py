"""Integer program solvers, HiGHS and CBC through PuLP, in a process that is killed if it overruns.

Both are asked for one thread. The status names PuLP gives after a time limit are not trusted: an
answer counts as a solution only once its placement has been checked and evaluated again, and as a
proof only through the bound the solver itself reports. A solver that dies, or is still busy a
while after its time limit, is killed with all it started; the next request starts a new process.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipecompile.passes.partition.model import Model
from pipecompile.passes.partition.problem import Assignment

#: Solvers by name, in the order ``auto`` tries them.
SOLVERS = ("highs", "cbc")

#: Seconds a solver may take beyond its limit before it is killed: to start, and to notice.
GRACE = 3.0

#: The script that solves.
ENGINE = Path(__file__).with_name("engine.py")


class SolverFailed(Exception):
    """A solver is missing or ended without a usable answer. Never leaves this package."""


@dataclass(frozen=True)
class Answer:
    """``values`` per column, or None if the solver found no solution; ``bound`` in model units.

    ``infeasible``: the solver says that there is none. ``complete``: it ended before its time limit.
    """

    values: list[float] | None
    bound: float
    infeasible: bool = False
    complete: bool = True


class Engine:
    """A context in which models are solved by one process, started with the first and ended at exit."""

    def __init__(self, command: list[str] | None = None) -> None:
        self.command = command or [sys.executable, "-P", str(ENGINE)]
        self.process: subprocess.Popen[bytes] | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def warm(self) -> None:
        """Start the process, so that it imports its solvers while the first model is being built."""
        try:
            self._running()
        except SolverFailed:
            pass  # the first request says so

    def solve(self, name: str, model: Model, start: Assignment | None, seconds: float, gap: float) -> Answer:
        """Solve the model with the named solver, from layers at the positions ``start`` if given.

        Raises:
            SolverFailed: if the solver is missing, dies, gives an error or has to be killed.
        """
        known = {} if start is None else model.write(start)
        request = {
            "solver": name,
            "lower": model.lower,
            "upper": model.upper,
            "rows": [(row.terms, row.const) for row in model.rows],
            "integer": list(model.choices.values()),
            "start": known,
            "seconds": seconds,
            "gap": gap,
        }
        kind, values, bound, complete = self._exchange(request, seconds)
        if kind == "failed":
            raise SolverFailed(values)
        if kind == "infeasible":
            return Answer(None, 0.0, infeasible=True)
        return Answer(values, bound, complete=complete)

    def _exchange(self, request: dict[str, Any], seconds: float) -> tuple[str, Any, Any, bool]:
        deadline = time.monotonic() + seconds + GRACE
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        assert self.folder is not None
        data = memoryview(pickle.dumps({**request, "folder": self.folder.name}))
        received = bytearray()
        sink, source = process.stdin.fileno(), process.stdout.fileno()
        try:
            while True:
                # Looked at once more after the deadline: this process itself may have been stopped meanwhile.
                left = deadline - time.monotonic()
                ready, writable, _ = select.select([source], [sink] if data else [], [], max(0.0, left))
                if not ready and left <= 0:
                    raise SolverFailed(f"still busy {GRACE:g} s after its limit of {seconds:.3g} s: killed")
                if writable:
                    data = data[os.write(sink, data) :]
                if ready:
                    chunk = os.read(source, 1 << 20)
                    if not chunk:
                        raise SolverFailed(f"its process died ({_end(process)})")
                    received += chunk
                    if received.endswith(b"."):  # the last byte of every pickle, though not of it alone
                        try:
                            return pickle.loads(bytes(received))
                        except (EOFError, pickle.UnpicklingError):
                            continue
        except BrokenPipeError:
            raise SolverFailed(f"its process died ({_end(process)})") from None
        except BaseException:
            self.kill()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.kill()
        self.folder = tempfile.TemporaryDirectory(prefix="pipecompile-")
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that it can be killed with whatever it started
            )
        except OSError as error:
            raise SolverFailed(f"cannot be started: {error}") from None
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        return self.process

    def kill(self) -> None:
        """End the process and all it started, and remove their files."""
        process, self.process = self.process, None
        if process is not None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        folder, self.folder = self.folder, None
        if folder is not None:
            folder.cleanup()


def _end(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(timeout=1.0)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


__all__ = ["ENGINE", "GRACE", "SOLVERS", "Answer", "Engine", "SolverFailed"]
