"""How much do jobs slow each other down? Each loops in a worker on its own core, alone and then all at once.

Nothing is handed from one to another: what is seen is what cores that share caches and memory cost
each other. Turns alone and together alternate, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from pipecompile.errors import PipelineError
from pipecompile.ir.measure import Job
from pipecompile.runtime import numerics, nursery, pickled
from pipecompile.runtime.arena import adopt, open_state
from pipecompile.runtime.module import execute
from pipecompile.runtime.step_worker import main
from pipecompile.runtime.trial import apart
from pipecompile.runtime.untouched import Untouched

#: Turns alone and together; runs of the slowest job that a window has room for; of each job at least.
TURNS, ROOM, FEWEST = 4, 4, 2

#: Seconds a window is made longer to at most, for the sake of room.
_LONGEST = 0.25

#: Seconds a worker may take to start, or to answer beyond the end of a window.
_PATIENCE = 60.0


def slowdowns(
    jobs: Sequence[Job], cores: Sequence[int | None], budget: float, imports: Sequence[str] = ()
) -> list[float]:
    """Time of each job while all run at once, over its time alone; windows of ``budget`` seconds a job in all.

    Jobs of one core take turns on it, which is not counted: their time on the processor is compared.

    Raises:
        PipelineError: if a worker does not start, or is lost.
        PipecompileError: if the arguments cannot be shared with workers.
    """
    busy = [core for core in cores if core is not None]
    shared = [busy.count(core) > 1 for core in busy] if len(busy) == len(cores) else [True] * len(cores)
    tensors = {
        f"{j}.{i}": a for j, job in enumerate(jobs) for i, a in enumerate(job.arguments) if isinstance(a, torch.Tensor)
    }
    weights = adopt(apart(tensors))
    arenas = [arena.fd for arena in weights.arenas]
    ratios: list[list[float]] = [[] for _ in jobs]
    with ExitStack() as stack:
        workers: list[_Worker] = []
        for j, (job, core) in enumerate(zip(jobs, cores, strict=True)):
            names = {i: f"{j}.{i}" for i in range(len(job.arguments)) if f"{j}.{i}" in tensors}
            plain = [None if i in names else a for i, a in enumerate(job.arguments)]
            entries = weights.describe(list(names.values()))
            boot = Looping(
                job.source, job.function, plain, list(names), arenas, entries, numerics.snapshot(), tuple(imports)
            )
            workers.append(_Worker(boot, core, arenas))
            stack.callback(workers[-1].stop)
        once = [_window(workers, [j], 0.0, shared)[0] for j in range(len(jobs))]
        window = max(budget / TURNS, min(ROOM * max(once), _LONGEST))
        for _ in range(TURNS):
            alone = [_window(workers, [j], window, shared)[0] for j in range(len(jobs))]
            together = _window(workers, range(len(jobs)), window, shared)
            for seen, apart_, beside in zip(ratios, alone, together, strict=True):
                seen.append(beside / apart_ if apart_ > 0 else 1.0)
    return [max(1.0, statistics.median(seen)) for seen in ratios]


def _window(workers: Sequence[_Worker], at: Sequence[int], seconds: float, shared: Sequence[bool]) -> list[float]:
    """Median seconds of the jobs ``at``, running at once from one moment to another."""
    start = time.monotonic() + 0.002
    for j in at:
        workers[j].ask((start, start + seconds, shared[j]))
    return [workers[j].told() for j in at]


@dataclass(frozen=True)
class Looping:
    """What a worker is to run over and over; the arguments at the places ``shared`` lie in ``arenas``."""

    source: str
    function: str
    plain: list[Any]
    shared: list[int]
    arenas: list[int]
    entries: list[dict[str, Any]]
    settings: dict[str, Any]
    imports: tuple[str, ...]

    def device(self, _commands: socket.socket) -> _Loop:
        """In the worker: compute as a stage does, and run once, so that what cannot run is told at the start."""
        torch.set_num_threads(1)
        torch.set_num_interop_threads(1)
        torch.backends.mha.set_fastpath_enabled(False)
        numerics.restore(self.settings)
        torch.set_grad_enabled(False)
        for name in self.imports:
            importlib.import_module(name)
        arguments = list(self.plain)
        for place, tensor in zip(self.shared, open_state(self.arenas, self.entries), strict=True):
            arguments[place] = tensor
        run = execute(self.source, "<measured stage>")[self.function]
        untouched = Untouched(arguments)
        run(*arguments)
        return _Loop(run, arguments, untouched)


@dataclass(frozen=True)
class _Loop:
    """The job in its worker."""

    run: Callable[..., Any]
    arguments: Sequence[Any]
    untouched: Untouched

    def answer(self, message: tuple[float, float, bool]) -> float:
        """Median seconds of runs from one moment to another, on the clock or on the processor."""
        start, stop, processor = message
        clock = time.thread_time if processor else time.perf_counter
        time.sleep(max(0.0, start - time.monotonic()))
        times: list[float] = []
        while len(times) < FEWEST or time.monotonic() < stop:
            self.untouched.restore()
            begin = clock()
            self.run(*self.arguments)
            times.append(clock() - begin)
        return statistics.median(times)


class _Worker:
    """A process that runs one job, on request, for a window of time."""

    def __init__(self, boot: Looping, core: int | None, arenas: Sequence[int]) -> None:
        self._control, control = socket.socketpair()
        self._commands, commands = socket.socketpair()
        self._commands.settimeout(_PATIENCE)
        fds = [control.fileno(), commands.fileno()]
        words = ["--control", str(fds[0]), "--commands", str(fds[1]), "--core", str(-1 if core is None else core)]
        with control, commands:
            try:
                self._process = nursery.start(__name__, words, [*fds, *arenas], 1)
            except BaseException:
                self._control.close()
                self._commands.close()
                raise
        try:
            try:
                pickled.send(self._commands, boot)
            except Exception as error:  # pickling runs user code
                raise PipelineError(f"a stage cannot be sent to a worker: {type(error).__name__}: {error}") from error
            answer = self._hear()
            if answer != ("ready",):
                raise PipelineError(f"a stage could not be run in a worker: {answer}")
        except BaseException:
            self.stop()
            raise

    def ask(self, message: tuple[float, float, bool]) -> None:
        """Begin a window, without waiting."""
        try:
            pickled.send(self._commands, message)
        except OSError as error:
            raise PipelineError(f"a worker that timed a stage was lost: {error}") from error

    def told(self) -> float:
        """What the window begun last gave."""
        return float(self._hear())

    def _hear(self) -> Any:
        try:
            return pickled.receive(self._commands)
        except (EOFError, OSError) as error:
            raise PipelineError(f"a worker that timed a stage was lost: {error or 'it ended'}") from error

    def stop(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._commands.close()
            self._control.close()
        self._process.kill()
        self._process.wait()


__all__ = ["Looping", "slowdowns"]

if __name__ == "__main__":
    main()
