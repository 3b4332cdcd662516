"""Keeps one executor running for a pipeline: started when needed, anew where it must be, used by one at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from pipecompile.arguments import Arguments
from pipecompile.errors import InputError, PipelineClosed, StageError
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import evaluate
from pipecompile.ir.package import Package
from pipecompile.ir.tree import unflatten
from pipecompile.runtime.executor import Executor
from pipecompile.runtime.inline import InlineSession
from pipecompile.runtime.session import Session
from pipecompile.runtime.surviving import Surviving
from pipecompile.streams.ledger import Ledger
from pipecompile.streams.state import State

ExecutorName = Literal["process", "inline"]
OnFailure = Literal["raise", "restart"]
T = TypeVar("T")

CALL, STREAM, TICKETS = "a call", "a stream", "submitted samples"


class Engine:
    """The running part of a pipeline. What uses it claims it first: a call, a stream, or submitted samples."""

    def __init__(
        self,
        package: Package,
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        *,
        executor: ExecutorName,
        on_failure: OnFailure,
        hang_seconds: float | None,
        throttle: Mapping[str, Link] | None,
    ) -> None:
        if on_failure not in ("raise", "restart"):
            raise InputError(f"on_failure={on_failure!r} is neither 'raise' nor 'restart'")
        self.package, self.throttle = package, throttle
        self.state = State(package, tensors, model)
        self.arguments = Arguments(package)
        self.ledger = Ledger()
        self.session: Executor | None = None
        self._kind = Session if executor == "process" else InlineSession
        self._survive = on_failure == "restart" and executor == "process"
        self._hang_seconds = hang_seconds
        self._sizes: dict[str, int] = {}
        self._closed, self._cause = "", None
        self._owner = os.getpid()
        self._users, self._user = threading.Condition(), ""

    def check(self) -> None:
        """Refuse use after the end, and in a fork.

        Raises:
            PipelineClosed: with the reason.
        """
        if os.getpid() != self._owner:
            raise PipelineClosed(
                f"this pipeline belongs to process {self._owner}, and this is a fork of it: compile or load one here"
            )
        if self._closed:
            raise PipelineClosed(f"this pipeline cannot be used any more: {self._closed}") from self._cause

    @property
    def foreign(self) -> bool:
        """Whether this is a fork of the process the pipeline belongs to."""
        return os.getpid() != self._owner

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return bool(self._closed)

    def claim(self, user: str) -> None:
        """Have the executor to oneself. Waits for calls in other threads, which are short.

        Raises:
            InputError: if a stream or submitted samples are under way.
        """
        self.check()
        with self._users:
            while self._user == CALL:
                self._users.wait(1.0)
                self.check()
            if self._user:
                how = "wait for flush()" if self._user == TICKETS else "finish or close that"
                raise InputError(f"the pipeline is busy with {self._user}: {how} first")
            self._user = user

    def release(self) -> None:
        """Let others have it."""
        with self._users:
            self._user = ""
            self._users.notify_all()

    @property
    def busy(self) -> bool:
        """Whether anybody has claimed it."""
        return bool(self._user)

    def ready(self, leaves: list[Any] | None) -> Executor:
        """The running executor, started, or started anew where weights moved or sizes grew.

        Nothing may be in flight.

        Raises:
            PipelineClosed: after the end.
            InputError: if a weight has another shape or dtype than compiled for.
        """
        self.check()
        grown = leaves is not None and self.outgrows(leaves)
        if self.session is not None and (grown or self.state.moved()):
            self.session.close()
            self.session = None
        if self.session is None:
            if grown and leaves is not None:
                sizes = self.arguments.sizes(leaves)
                self._sizes = {name: max(size, self._sizes.get(name, 0)) for name, size in sizes.items()}
            self.session = self._start()
            self.state.remember()
        return self.session

    def _start(self) -> Executor:
        tensors, sizes = self.state.refreshed(), self._sizes or None

        def start() -> Executor:
            return self._kind(
                self.package, tensors, sizes=sizes, throttle=self.throttle, hang_seconds=self._hang_seconds
            )

        if not self._survive:
            return start()
        written = {entry.name: tensors[entry.name] for entry in self.package.state if entry.mutated}
        return Surviving(start, written)

    def takes(self, leaves: list[Any] | None) -> bool:
        """Whether the running executor can compute such a sample: it has room for it, and the model's weights of now.

        Looked at for every sample: the model may get other storage in the middle of a stream.
        """
        return self.session is not None and (leaves is None or not (self.outgrows(leaves) or self.state.moved()))

    def outgrows(self, leaves: list[Any]) -> bool:
        """Whether a sample with dynamic sizes needs larger rings than the present ones."""
        if not self.package.symbols:
            return False
        sizes = self.arguments.sizes(leaves)
        if self.session is None or not self._sizes:
            return True
        limits = {spec.limit for edge in self.package.program.edges for spec in edge.specs if spec.dynamic}
        return any(evaluate(limit, sizes) > evaluate(limit, self._sizes) for limit in limits)

    def rebuild(self, leaves: list[Any]) -> Any:
        """The result in the structure the model returns."""
        return unflatten(self.package.out_tree, leaves)

    def guard(self, action: Callable[[], T]) -> T:
        """Do something that fails only when the pipeline does, or one sample; a failed pipeline stays closed."""
        try:
            return action()
        except (StageError, PipelineClosed):
            raise
        except Exception as error:
            self.fail(error)
            raise

    def fail(self, error: Exception) -> None:
        """End for good because of an error."""
        if not self._closed:
            self._closed, self._cause = f"it failed: {str(error).splitlines()[0]}", error
        if self.session is not None:
            self.session.close()

    def close(self) -> None:
        """End the workers. May be repeated; does nothing in a fork."""
        if self.foreign:
            return
        self._closed = self._closed or "it was closed"
        if self.session is not None:
            self.session.close()
