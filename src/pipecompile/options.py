"""The options of compile(), by mode; what is unknown, out of place or missing is named."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import nn

from pipecompile.errors import InputError, PlanError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.learning import Clock, Updates
from pipecompile.passes.partition import ObjectiveName
from pipecompile.pipelines.param_groups import Groups
from pipecompile.runtime.batches import Reduction
from pipecompile.runtime.learn import OnNonfinite
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.schedules.recompute import RecomputeName
from pipecompile.schedules.training import ScheduleName
from pipecompile.streams.engine import ExecutorName, OnFailure
from pipecompile.streams.entrance import Options as StreamOptions
from pipecompile.streams.entrance import Overload

#: Called with the name of the phase that begins and the fraction of the work done, 0.0 to 1.0.
Progress = Callable[[str, float], None]

Mode = Literal["infer", "train", "learn"]


class EveryMode(TypedDict, total=False):
    """Options of every mode."""

    devices: int | Sequence[str] | Cluster
    memory: float | str | Mapping[str, float | str] | None
    leaf: Sequence[str | type[nn.Module]]
    ahead: int | None
    executor: ExecutorName
    time_limit: float
    profile_seconds: float
    hang_seconds: float | None
    throttle: Mapping[str, Link] | None
    imports: Sequence[str]
    progress: Progress | None


class InferenceOptions(EveryMode, total=False):
    """Options of ``mode="infer"``."""

    dynamic_shapes: Any | None
    pin: Mapping[str, str | Sequence[str]] | None
    colocate: Sequence[str | Sequence[str]]
    replicate: bool
    objective: ObjectiveName | tuple[ObjectiveName, float]
    use_cache: bool
    on_overload: Overload
    max_in_flight: int | None
    deadline: float | None
    on_failure: OnFailure


class LossAndOptimizer(TypedDict):
    """What learning needs."""

    loss_fn: Callable[[Any, Any], Any]
    optimizer: OptimizerFactory


class TrainingOptions(EveryMode, total=False):
    """Options of ``mode="train"``; loss and optimizer go together, or there is neither."""

    loss_fn: Callable[[Any, Any], Any] | None
    optimizer: OptimizerFactory | None
    param_groups: Groups | None
    schedule: ScheduleName
    micro_batches: int | Literal["auto"]
    data_parallel: int | None
    dynamic_batch: bool
    autocast: torch.dtype | None
    reduction: Reduction
    example_targets: Any
    clip_norm: float | None
    memory_limit: int | None
    recompute: RecomputeName
    deferred_batch_norm: bool
    check_finite: bool
    seed: int
    keep_gradients: bool


class LearningOptions(EveryMode, LossAndOptimizer, total=False):
    """Options of ``mode="learn"``."""

    updates: Updates
    clock: Clock
    accumulate: int | None
    example_targets: Any
    on_nonfinite: OnNonfinite
    scale_lr: bool
    clip_norm: float | None
    on_failure: OnFailure
    snapshot_every: int
    seed: int


_OPTIONS: Mapping[str, Any] = {"infer": InferenceOptions, "train": TrainingOptions, "learn": LearningOptions}


def names_of(mode: Mode) -> list[str]:
    """The names of all options of a mode."""
    return list(_OPTIONS[mode].__annotations__)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and value >= 0


def _patterns(value: Any) -> bool:
    """Texts, or lists of texts, in a list."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    groups: Sequence[Any] = value
    return all(isinstance(group, str) or _texts(group) for group in groups)


def _texts(value: Any, *others: type) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    entries: Sequence[Any] = value
    return all(isinstance(entry, (str, *others)) for entry in entries)


def _links(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    links: Mapping[Any, Any] = value
    return all(isinstance(link, Link) for link in links.values())


#: What some options must be, where the mistake would otherwise be told by whoever stumbles over it.
_VALUES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "pin": (lambda value: isinstance(value, Mapping), "a dict from patterns of layer names to devices"),
    "leaf": (lambda value: _texts(value, type), "a list of module paths, such as ['encoder.layer.*'], or classes"),
    "imports": (_texts, "a list of names of modules"),
    "throttle": (_links, "a dict from edges, such as '0>1', to Links"),
    "progress": (callable, "a function of a phase and a fraction"),
    "dynamic_shapes": (
        lambda value: isinstance(value, (Mapping, tuple, list)),
        "a tuple or dict, an entry for each input, as for torch.export.export",
    ),
    "on_failure": (lambda value: value in get_args(OnFailure), "'raise' or 'restart'"),
    "hang_seconds": (_real, "a number of seconds above 0"),
    "time_limit": (_amount, "a number of seconds, 0 or more"),
    "colocate": (_patterns, "a list of patterns of layer names, or of lists of them"),
    "data_parallel": (_whole, "a whole number of pipelines"),
    "micro_batches": (lambda value: _whole(value) or value == "auto", "a whole number or 'auto'"),
    "snapshot_every": (lambda value: isinstance(value, int), "a whole number of samples"),
    "seed": (lambda value: isinstance(value, int), "a whole number"),
    "schedule": (lambda value: isinstance(value, str), "the name of a schedule, or 'auto'"),
    "memory_limit": (_amount, "a number of bytes, 0 or more"),
    "ahead": (lambda value: isinstance(value, int) and value >= 0, "a whole number of messages, 0 or more"),
    "clip_norm": (_real, "a number above 0"),
    "profile_seconds": (_real, "a number of seconds above 0"),
}


def check_options(mode: str, given: Mapping[str, Any]) -> None:
    """Refuse a mode or options that nobody knows, that another mode takes, and a mode without what it needs.

    Raises:
        PlanError: for an unknown mode.
        InputError: naming the option, and the modes that take it; or for an unknown executor.
        TypeError: for an option of no mode.
    """
    if mode not in _OPTIONS:
        raise PlanError(f"mode={mode!r} is not available: choose {_either(map(repr, _OPTIONS))}")
    takers = {name: [m for m, options in _OPTIONS.items() if name in options.__annotations__] for name in given}
    for name, modes in takers.items():
        if not modes:
            every = ["mode", *dict.fromkeys(name for options in _OPTIONS.values() for name in options.__annotations__)]
            close = difflib.get_close_matches(name, every, 1)
            raise TypeError(f"compile() has no option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    strange = sorted(name for name, modes in takers.items() if mode not in modes)
    if strange:
        takes = _either(f"mode={m!r}" for m in dict.fromkeys(m for name in strange for m in takers[name]))
        raise InputError(f"{', '.join(strange)}: only {takes} takes that, this is mode={mode!r}")
    check_values(given)
    executor = given.get("executor", "process")
    if executor not in get_args(ExecutorName):
        raise InputError(f"executor={executor!r} is neither {' nor '.join(map(repr, get_args(ExecutorName)))}")
    missing = sorted(_OPTIONS[mode].__required_keys__ - set(given))
    if missing:
        raise InputError(
            f"mode={mode!r} needs {' and '.join(f'{name}=' for name in missing)}: for example "
            "loss_fn=torch.nn.CrossEntropyLoss(), optimizer=functools.partial(torch.optim.SGD, lr=0.1)"
        )


def check_values(given: Mapping[str, Any]) -> None:
    """Refuse values of a wrong kind before any work is done: a model may take minutes to trace and to time.

    Raises:
        InputError: naming the option.
    """
    for name, value in given.items():
        fits, what = _VALUES.get(name, (None, ""))
        if fits is not None and value is not None and not fits(value):
            raise InputError(f"{name}={value!r}: it must be {what}")
    # What the options of a stream may be is known there.
    StreamOptions(**{name: given[name] for name in ("on_overload", "max_in_flight", "deadline") if name in given})


def _either(words: Any) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else str(last)


def silent(_phase: str, _fraction: float) -> None:
    """Progress that nobody watches."""


__all__ = [
    "EveryMode",
    "InferenceOptions",
    "LearningOptions",
    "LossAndOptimizer",
    "Mode",
    "Progress",
    "TrainingOptions",
    "check_options",
    "check_values",
    "names_of",
    "silent",
]
