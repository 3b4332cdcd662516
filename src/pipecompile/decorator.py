"""``@pipecompile.pipeline``: a model class whose instances run as pipelines when called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch import nn

from pipecompile.decorated import NAMES, Options, decorated
from pipecompile.eager import running_eager
from pipecompile.errors import InputError
from pipecompile.options import names_of
from pipecompile.pipelines.inference import InferencePipeline

M = TypeVar("M", bound=nn.Module)


@overload
def pipeline(cls: type[M], /) -> type[M]: ...


@overload
def pipeline(
    cls: None = None,
    /,
    *,
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    new_shape: Literal["recompile", "refuse"] = "recompile",
    max_pipelines: int = 4,
    **options: Any,
) -> Callable[[type[M]], type[M]]: ...


def pipeline(
    cls: type[M] | None = None,
    /,
    *,
    example_inputs: Sequence[Any] | torch.Tensor | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    new_shape: Literal["recompile", "refuse"] = "recompile",
    max_pipelines: int = 4,
    **options: Any,
) -> type[M] | Callable[[type[M]], type[M]]:
    """Let every instance of a module class run as a pipeline, compiled at its first call.

        @pipecompile.pipeline(devices=2)
        class Net(nn.Module): ...

    The class stays what it is: the same object, with its names, parameters, ``state_dict``,
    pickling and subclasses. A subclass is a pipeline too, with its own ``forward``. Added are

    - ``net.pipeline``: the :class:`InferencePipeline` used last, or None before the first call
      (with ``example_inputs`` it is compiled when asked for);
    - ``net.stream(samples, ...)``: as :meth:`InferencePipeline.stream`; never records gradients;
    - ``net.close()``: ends the workers. The next call compiles again. They also end with the model.

    A parameter changed in place counts from the next sample on. Replaced storage is noticed, and
    the workers get the new one. A changed submodule, attribute (number, string, boolean), dtype or
    ``requires_grad`` means compiling again.

    Calls run eager, which is said once by a :class:`PipecompileWarning`, where a pipeline could not
    give the same: where gradients would be recorded, in ``train()`` mode where that differs, with
    forward hooks, under autocast, within ``torch.func`` transforms or ``functional_call``, off the
    CPU. Within ``torch.compile`` and ``torch.export`` the original ``forward`` is what they see.

    Args:
        cls: the class, when used without parentheses.
        example_inputs: compile for a call with these rather than with the first call's arguments.
        example_kwargs: its keyword arguments.
        new_shape: what a call with another shape, dtype, structure or constant does: compile
            again (``"recompile"``, said once) or raise (``"refuse"``).
        max_pipelines: how many compiled forms to keep; the one longest unused is closed.
        options: as for :func:`pipecompile.compile`: ``devices=2``, ``leaf=``, ``dynamic_shapes=`` ...

    Raises:
        TypeError: if an option is unknown, or what is decorated is not a module class.
        InputError: if the class itself has an attribute ``pipeline``, ``stream`` or ``close``. At
            the first call also what :func:`pipecompile.compile` raises.
    """
    known = ["mode", *names_of("infer")]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(
            f"pipeline() has no option {unknown[0]!r}; there are new_shape, max_pipelines, {', '.join(known)}"
        )
    if options.get("mode", "infer") != "infer":
        raise TypeError("a decorated model is for inference: train with pipecompile.compile(model, mode='train', ...)")
    if new_shape not in ("recompile", "refuse"):
        raise TypeError(f"new_shape={new_shape!r}: choose 'recompile' or 'refuse'")
    if max_pipelines < 1:
        raise TypeError(f"max_pipelines={max_pipelines}: at least one is needed")
    example = None
    if example_inputs is not None or example_kwargs is not None:
        given = () if example_inputs is None else example_inputs
        args = (given,) if isinstance(given, torch.Tensor) else tuple(given)
        example = (args, dict(example_kwargs or {}))
    chosen = Options(example, new_shape, max_pipelines, options)

    def decorate(found: type[M]) -> type[M]:
        _install(found, chosen)
        return found

    return decorate if cls is None else decorate(cls)


def _install(cls: Any, options: Options) -> None:
    if isinstance(cls, nn.Module):
        raise TypeError(
            f"pipeline() decorates a class, not a model: for this {type(cls).__name__} use pipecompile.compile()"
        )
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"pipeline() decorates a torch.nn.Module class, not {cls!r}")
    first = not hasattr(cls, "_pipecompile_options")
    cls = cast(Any, cls)
    cls._pipecompile_options = options
    _wrap_forward(cls)
    if not first:
        return
    for name in NAMES:
        if hasattr(cls, name):
            raise InputError(f"{cls.__name__} has an attribute {name!r} of its own, which @pipeline adds: rename it")
    cls.pipeline, cls.stream, cls.close = property(_pipeline), _stream, _close
    inherited = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(sub: type, **kwargs: Any) -> None:
        if inherited is None:
            super(cls, sub).__init_subclass__(**kwargs)
        else:
            inherited.__func__(sub, **kwargs)
        if "forward" in vars(sub):
            _wrap_forward(sub)

    cls.__init_subclass__ = classmethod(__init_subclass__)


def _wrap_forward(cls: Any) -> None:
    forward = cls.forward
    if hasattr(forward, "_pipecompile"):
        return

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # First, so that torch.compile sees nothing but the original.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return forward(self, *args, **kwargs)
        # A subclass that took over otherwise, or one instance, runs what it put in place.
        if running_eager() or getattr(type(self), "forward", None) is not wrapper or "forward" in vars(self):
            return forward(self, *args, **kwargs)
        return decorated(self).call(forward, args, kwargs)

    wrapper._pipecompile = True  # type: ignore[attr-defined]
    cls.forward = wrapper


def _pipeline(self: nn.Module) -> InferencePipeline | None:
    """The pipeline used last; None before the first call and after ``close()``."""
    return decorated(self).pipeline


def _stream(self: nn.Module, samples: Iterable[Any], **options: Any) -> Iterator[Any]:
    """Results for a source of samples, as :meth:`pipecompile.InferencePipeline.stream` gives them.

    Compiles for the first sample where nothing is compiled yet.

    Raises:
        InputError: where a call would run eager for another reason than gradients.
    """
    return decorated(self).stream(samples, options)


def _close(self: nn.Module) -> None:
    """End the workers; parameters stay as they are. The next call compiles again."""
    decorated(self).close()
