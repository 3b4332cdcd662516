"""What users hold: a compiled model that is called, streamed through, saved and closed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from pipecompile import artefact
from pipecompile._version import __version__
from pipecompile.arguments import Arguments
from pipecompile.errors import InputError, PipelineClosed
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import evaluate
from pipecompile.ir.package import Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.timeline import Timeline
from pipecompile.ir.tree import unflatten
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.inline import InlineSession
from pipecompile.runtime.session import Session
from pipecompile.simulate import simulate

ExecutorName = Literal["process", "inline"]
T = TypeVar("T")


class InferencePipeline(nn.Module):
    """A compiled model. ``pipe(x)`` equals ``model(x)``; ``pipe.stream(xs)`` keeps every device busy.

    ``state_dict()``, ``parameters()`` and the like are the model's own, under its own names, and
    share their storage with the workers: a parameter changed in place counts from the next sample
    on. Workers start at the first use and end with ``close()``, at the end of a ``with`` block, or
    when the pipeline is garbage collected.
    """

    _model: nn.Module

    def __init__(
        self,
        package: Package,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        *,
        executor: ExecutorName = "process",
        hang_seconds: float | None = None,
        throttle: Mapping[str, Link] | None = None,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule: names stay the model's own
        self._package = package
        self._state = _State(package, tensors, model)
        self._arguments = Arguments(package)
        self._executor: ExecutorName = executor
        self._options: dict[str, Any] = {"hang_seconds": hang_seconds, "throttle": throttle}
        self._session: Executor | None = None
        self._sizes: dict[str, int] = {}
        self._closed = ""
        self._lock = threading.RLock()
        self._initial = {e.name: tensors[e.name].detach().clone() for e in package.state if e.mutated}
        self.training = False

    @property
    def plan(self) -> Plan:
        """Which layers run where, and what that is predicted to cost."""
        return self._package.plan

    @property
    def program(self) -> Program:
        """The schedule as data."""
        return self._package.program

    @property
    def package(self) -> Package:
        """Everything that ``save()`` writes but the weights."""
        return self._package

    @property
    def closed(self) -> bool:
        """Whether it was closed or has failed, and cannot be used any more."""
        return bool(self._closed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One sample through the whole pipeline; the same result as the model's.

        Raises:
            InputError: if the call does not match what was compiled.
            PipelineError: if a stage raises, or a worker dies or hangs.
        """
        with self._lock:
            leaves = self._arguments.of_call(args, kwargs)
            session = self._ready(leaves)
            if session.in_flight:
                raise InputError("the pipeline is busy with a stream: finish or close that stream first")
            while session.submit(leaves) is None:  # a worker has yet to offer its first slot
                self._guard(session, _wait)
            return self._rebuild(self._result(session))

    def stream(self, samples: Iterable[Any]) -> Generator[Any, None, None]:
        """Results for a source of samples, in order, while later samples are already under way.

        A sample is a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        The source is read as far ahead as the rings hold. Ending the iteration early drops what
        is still in flight.
        """
        source = iter(samples)
        waiting: list[Any] | None = None
        exhausted = False
        with self._lock:
            session = self._ready(None)
            if session.in_flight:
                raise InputError("the pipeline already runs a stream: finish or close that one first")
            try:
                while True:
                    if waiting is None and not exhausted:
                        try:
                            waiting = self._arguments.of_item(next(source))
                        except StopIteration:
                            exhausted = True
                    fits = waiting is None or not self._outgrows(waiting)
                    if waiting is not None and not fits and not session.in_flight:
                        session, fits = self._ready(waiting), True
                    if waiting is not None and fits and session.submit(waiting) is not None:
                        waiting = None
                        continue
                    if waiting is None and not session.in_flight:
                        return
                    room = waiting is not None and fits and self._guard(session, _wait)
                    if not room and session.in_flight:
                        yield self._rebuild(self._result(session))
            finally:
                while not self._closed and session.in_flight:
                    self._result(session)

    def simulate(self, samples: int = 64) -> Timeline:
        """What the plan predicts for a stream of that many samples."""
        link = self.plan.cluster.link
        return simulate(self.program, self.plan, link, samples, throttle=self._options["throttle"])

    def timeline(self) -> Timeline:
        """What was measured of the last samples.

        Raises:
            PipelineClosed: if nothing has run yet.
        """
        if self._session is None:
            raise PipelineClosed("nothing has run yet: there is no timeline")
        return self._session.timeline()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the pipeline to a folder that :func:`pipecompile.load` reads without the model's source.

        Raises:
            ArtefactError: if the folder cannot be written or holds something else.
        """
        with self._lock:
            return artefact.save(self._package, self._state.current(), path, __version__)

    def reset_state(self) -> None:
        """Put buffers that the model writes to back to what they were when it was compiled."""
        with self._lock, torch.no_grad():
            if self._session is not None and self._session.in_flight:
                raise InputError("samples are in flight: finish the stream before reset_state()")
            current = self._state.current()
            for name, value in self._initial.items():
                current[name].copy_(value)

    def close(self) -> None:
        """End the workers. Closing twice is fine; parameters and buffers stay usable."""
        if self._session is not None:
            self._session.close()
        self._closed = self._closed or "it was closed"

    def __enter__(self) -> InferencePipeline:
        """Close the pipeline at the end of the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the pipeline."""
        self.close()

    def _ready(self, leaves: list[Any] | None) -> Executor:
        """The running executor, started or started anew where weights moved or sizes grew."""
        if self._closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed}")
        grown = leaves is not None and self._outgrows(leaves)
        if self._session is not None and (grown or self._state.moved()):
            self._session.close()
            self._session = None
        if self._session is None:
            if grown and leaves is not None:
                sizes = self._arguments.sizes(leaves)
                self._sizes = {name: max(size, self._sizes.get(name, 0)) for name, size in sizes.items()}
            kind = Session if self._executor == "process" else InlineSession
            self._session = kind(self._package, self._state.refreshed(), sizes=self._sizes or None, **self._options)
            self._state.remember()
        return self._session

    def _outgrows(self, leaves: list[Any]) -> bool:
        """Whether a sample with dynamic sizes needs larger rings than the present ones."""
        if not self._package.symbols:
            return False
        sizes = self._arguments.sizes(leaves)
        if self._session is None or not self._sizes:
            return True
        limits = {spec.limit for edge in self.program.edges for spec in edge.specs if spec.dynamic}
        return any(evaluate(limit, sizes) > evaluate(limit, self._sizes) for limit in limits)

    def _result(self, session: Executor) -> list[Any]:
        return self._guard(session, _next_result)[1]

    def _guard(self, session: Executor, action: Callable[[Executor], T]) -> T:
        """Do something that fails when the pipeline does; a failed pipeline stays closed."""
        try:
            return action(session)
        except Exception as error:
            self._closed = f"it failed: {str(error).splitlines()[0]}"
            session.close()
            raise

    def _rebuild(self, leaves: list[Any]) -> Any:
        return unflatten(self._package.out_tree, leaves)

    # nn.Module's own view of parameters and buffers is the model's, names included.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's ``state_dict``."""
        return self._model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load into the model; counts from the next sample on."""
        return self._model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        """The model's parameters under its own names."""
        return self._model.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        """The model's buffers under its own names."""
        return self._model.named_buffers(*args, **kwargs)

    def extra_repr(self) -> str:
        """Model, stages and devices."""
        devices = ", ".join(device.name for device in self.plan.cluster.devices)
        return f"{self._package.model}, {len(self.plan.stages)} stages on {devices}"


def _wait(session: Executor) -> bool:
    return session.wait()


def _next_result(session: Executor) -> tuple[int, list[Any]]:
    return session.result()


class _State:
    """The tensors of a package, looked up anew in the model: it may have replaced a parameter."""

    def __init__(self, package: Package, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
        self._tensors = dict(tensors)
        self._compiled = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._homes: list[tuple[str, dict[str, Any], str]] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        for entry in package.state:
            path, _, key = entry.fqn.rpartition(".")
            owner = modules.get(path)
            for home in (vars(owner).get(kind, {}) for kind in ("_parameters", "_buffers")) if owner else ():
                if home.get(key) is tensors[entry.name]:
                    self._homes.append((entry.name, home, key))
        self._pointers: list[int] = []

    def current(self) -> dict[str, torch.Tensor]:
        """Placeholder name -> the tensor the model holds now."""
        for name, home, key in self._homes:
            self._tensors[name] = home[key]
        return self._tensors

    def refreshed(self) -> dict[str, torch.Tensor]:
        """The current tensors, checked to be of the shape and dtype compiled for."""
        for name, tensor in self.current().items():
            shape, dtype = self._compiled[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise InputError(
                    f"{name} is now {tuple(tensor.shape)} {tensor.dtype}, compiled as {tuple(shape)} {dtype}: "
                    "compile the model again"
                )
        return self._tensors

    def remember(self) -> None:
        """Note where every tensor lies, to see later whether one moved."""
        self._pointers = [home[key].data_ptr() for _, home, key in self._homes]

    def moved(self) -> bool:
        """Whether the model holds other storage than noted (``assign=True``, ``.double()``, ``.data =``)."""
        return self._pointers != [home[key].data_ptr() for _, home, key in self._homes]
