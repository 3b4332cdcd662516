"""One decorated model: its pipelines, when they may be used, and when they must be made anew."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pipecompile import driver
from pipecompile.arguments import Arguments
from pipecompile.eager import eager_models
from pipecompile.errors import ExampleError, InputError, warn
from pipecompile.guards import Guards, plain
from pipecompile.ir.sample import Sample
from pipecompile.ir.tree import flatten
from pipecompile.pipelines.inference import InferencePipeline
from pipecompile.streams.pulled import Stream

#: What the decorator adds to a class.
NAMES = ("pipeline", "stream", "close")

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What the decorator was given."""

    example: Call | None
    new_shape: Literal["recompile", "refuse"]
    max_pipelines: int
    compile: Mapping[str, Any]


# Kept outside the model, so that its attributes, copies and pickles are the original's. An entry
# refers to its model weakly and goes with it.
_known: dict[int, Decorated] = {}
_lock = threading.Lock()


def decorated(model: nn.Module) -> Decorated:
    """What belongs to a model, made at the first use. A forked process has its own."""
    with _lock:
        found = _known.get(id(model))
        if found is None or found.pid != os.getpid():
            found = _known[id(model)] = Decorated(model, model._pipecompile_options)  # type: ignore[arg-type]
            weakref.finalize(model, _forget, id(model))
        return found


def _forget(key: int) -> None:
    # A pipeline or stream that somebody still holds goes on; any other ends here, and its workers with it.
    _known.pop(key, None)


class Decorated:
    """The pipelines of one model. It holds no strong reference to the model."""

    def __init__(self, model: nn.Module, options: Options) -> None:
        attributes = vars(model)
        for name in NAMES:
            if any(name in place for place in (attributes, attributes["_modules"], attributes["_parameters"])):
                raise InputError(f"this {type(model).__name__} sets {name!r}, which @pipeline adds: rename it")
        self.pid = os.getpid()
        self._model = weakref.ref(model)
        self._name = type(model).__name__
        self._options = options
        self._pipelines: list[tuple[InferencePipeline, Arguments]] = []  # the one used last comes last
        self._guards = Guards(model)
        self._said: set[str] = set()
        self._lock = threading.RLock()

    @property
    def pipeline(self) -> InferencePipeline | None:
        """The one used last; made from the example inputs if there are any and nothing is compiled yet."""
        with self._lock:
            self._drop_unusable()
            if not self._pipelines and self._options.example is not None:
                self._compile(*self._options.example)
            return self._pipelines[-1][0] if self._pipelines else None

    def call(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's result, from a pipeline where that gives the same."""
        model = self._model()
        assert model is not None
        with self._lock:
            leaves = [leaf for leaf in flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
            reason = self._reason(leaves, gradients=True)
            if not reason:
                return self._fitting(args, kwargs)(*args, **kwargs)
        self._say(reason[0], f"{self._name} runs eager, not as a pipeline: {reason[1]}")
        with eager_models():
            return forward(model, *args, **kwargs)

    def stream(self, samples: Iterable[Any], options: Mapping[str, Any]) -> Stream | Iterator[Any]:
        """See ``InferencePipeline.stream``."""
        with self._lock:
            reason = self._reason((), gradients=False)
            if reason:
                raise InputError(f"{self._name} cannot stream as a pipeline: {reason[1]}")
            pipe = self.pipeline
            if pipe is None:
                source = _Peeked(samples)
                if not source.head:
                    return iter(())
                pipe, samples = self._fitting(*_call_of(source.head[0])), source
        return pipe.stream(samples, **options)

    def close(self) -> None:
        """Close every pipeline."""
        with self._lock:
            for pipe, _ in self._pipelines:
                pipe.close()
            self._pipelines.clear()

    def _reason(self, leaves: Iterable[torch.Tensor], *, gradients: bool) -> tuple[str, str] | None:
        """Why a pipeline would not give what the model gives: kind and words."""
        leaves = tuple(leaves)
        if not all(map(plain, leaves)):
            return "inputs", "an input is no plain tensor (within vmap, grad, a fake mode, or of a class of its own)"
        if found := self._guards.substituted():
            return "substituted", f"{found} is substituted, as functional_call does"
        self._look_for_changes()
        wanted = gradients and torch.is_grad_enabled()
        if wanted and (self._guards.differentiable() or any(leaf.requires_grad for leaf in leaves)):
            return "gradients", "gradients are enabled. Call it under torch.no_grad() or torch.inference_mode()"
        if found := self._guards.in_training():
            return "training", f"it is in training mode, in which {found} may behave otherwise. Call .eval() first"
        if found := self._guards.hooked():
            return "hooks", f"{found} has a forward hook, which runs in Python at every call"
        if torch.is_autocast_enabled("cpu"):
            return "autocast", "autocast is enabled, which changes dtypes. Convert the model instead"
        if self._guards.elsewhere:
            return "device", f"{self._guards.elsewhere}, and the pipeline runs on CPU cores"
        return None

    def _look_for_changes(self) -> None:
        what = self._guards.changed()
        if not what:
            return
        model = self._model()
        assert model is not None
        if self._pipelines:
            self._say("changed", f"{self._name} has changed ({what}): it is compiled again")
            self.close()
        self._guards = Guards(model)

    def _fitting(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InferencePipeline:
        """A pipeline that takes such a call, compiled if there is none."""
        with self._lock:
            self._drop_unusable()
            if not self._pipelines and self._options.example is not None:
                self._compile(*self._options.example)
            trouble: InputError | None = None
            for entry in reversed(self._pipelines):
                try:
                    entry[1].of_call(args, kwargs)
                except InputError as error:
                    trouble = trouble or error
                    continue
                self._pipelines.remove(entry)
                self._pipelines.append(entry)
                return entry[0]
            if trouble is not None:
                if self._options.new_shape == "refuse":
                    raise trouble
                self._say(
                    "shape",
                    f"{self._name} is compiled again for another form of call ({trouble}). At most "
                    f"{self._options.max_pipelines} forms are kept; dynamic_shapes= makes one pipeline for many sizes",
                )
            try:
                return self._compile(args, kwargs)
            except ExampleError as error:
                # A call the model refuses: its callers expect the model's own error.
                raise error.__cause__ or error from None

    def _compile(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InferencePipeline:
        model = self._model()
        assert model is not None
        with eager_models():
            pipe = driver.compile(model, args, kwargs, **self._options.compile)
        # Export leaves cycles of frames behind that hold the model; the end of the model should end the workers.
        gc.collect()
        # The workers are to end with the model, so what ends them must not keep it alive.
        object.__setattr__(pipe, "_model", weakref.proxy(model))
        self._guards = Guards(model)  # capture may have filled caches of the model
        while len(self._pipelines) >= self._options.max_pipelines:
            self._pipelines.pop(0)[0].close()
        self._pipelines.append((pipe, Arguments(pipe.package)))
        return pipe

    def _drop_unusable(self) -> None:
        """Forget pipelines that failed or that somebody closed."""
        self._pipelines = [entry for entry in self._pipelines if not entry[0].closed]

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn(text)


class _Peeked:
    """A source whose first item was looked at. Keeps what a stream asks its source: ``live``."""

    def __init__(self, samples: Iterable[Any]) -> None:
        self.live = bool(getattr(samples, "live", False))
        self._rest: Iterator[Any] = iter(samples)
        self.head = list(itertools.islice(self._rest, 1))

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain(self.head, self._rest)


def _call_of(item: Any) -> Call:
    """An item of a stream as a call."""
    if isinstance(item, Sample):
        item = item.value
    if isinstance(item, tuple):
        return tuple(item), {}
    return ((), dict(item)) if isinstance(item, Mapping) else ((item,), {})
