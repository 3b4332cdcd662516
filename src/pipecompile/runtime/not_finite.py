"""Where a loss that is NaN or infinite comes from: its micro-batch once more, watched operator by operator.

The stages run forward in the caller's process, on the caller's weights and copies of the buffers,
with the random masks of that step. The first operator that makes NaN of operands without it is
the origin; where nothing is NaN, the last that makes an infinity of finite operands. A first run
finds its number, a second one stops there, so that the traceback names the place.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipecompile.ir.program import Program
from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.module import execute
from pipecompile.runtime.numerics import stage_mode
from pipecompile.runtime.step import Draw, generator_of, place

#: Operators that put given values in: masks of attention are infinite on purpose.
_MASKS = frozenset({"aten::masked_fill", "aten::masked_fill_", "aten::where", "aten::full", "aten::fill_"})

#: Operators that give memory as it is, whatever lay there: others write to it, as those of a dropout do.
_UNWRITTEN = frozenset(f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty"))


def origin(
    step: StepPackage,
    tensors: Mapping[str, torch.Tensor],
    criterion: Criterion,
    request: StepRequest,
    micro_batch: int,
    seed: int,
) -> str:
    """In words: an input, a weight, a layer with its stage, or the loss function."""
    package = step.package
    for name, leaf in zip(package.input_names, request.leaves[micro_batch], strict=True):
        if _any(torch.isnan, leaf) or _any(torch.isinf, leaf):
            return f"input {name!r} is not finite"
    names = {entry.name: entry.fqn for entry in package.state}
    for module in package.modules:
        for name in module.state:
            if _any(torch.isnan, tensors[name]):
                return f"{names[name]!r} on device {module.device} is NaN"
    again = _Again(step, tensors, criterion, request, micro_batch, seed)
    watch = _Watch()
    again.run(watch)
    stop = watch.first_nan if watch.first_nan is not None else watch.last_infinity
    if stop is None:
        return "no operator makes it of finite operands"
    return again.run(_Watch(stop)) or "its origin is not the same every time"


@dataclass(frozen=True)
class _Again:
    """The forward of one micro-batch, stage by stage."""

    step: StepPackage
    tensors: Mapping[str, torch.Tensor]
    criterion: Criterion
    request: StepRequest
    micro_batch: int
    seed: int

    def run(self, watch: _Watch) -> str:
        """Run everything; if ``watch`` stops it, says where that was."""
        package, made = self.step.package, tuple[Any, ...]()
        written = {entry.name for entry in package.state if entry.mutated}
        values: dict[str, Any] = dict(zip(package.input_names, self.request.leaves[self.micro_batch], strict=True))
        modules = {
            stage: module
            for module in package.modules
            for stage in module.stages
            if package.program.deal(stage).owns(self.micro_batch)
        }
        generator = generator_of(self.tensors)
        cards = [] if generator.device.type == "cpu" else [generator.device.index]
        with stage_mode(1), torch.random.fork_rng(devices=cards):
            for stage, module in sorted(modules.items()):
                code = execute(module.source, module.filename)
                reads, makes = _ends(package.program, stage)
                found = [self.tensors[name] for name in code[f"STATE_{stage}"]]
                names = code[f"STATE_{stage}"]
                state = tuple(t.clone() if n in written else t for n, t in zip(names, found, strict=True))
                given = [self.loss] if package.plan.ends(stage) else []
                try:
                    with watch:
                        made, _ = code[f"forward_{stage}"](
                            Draw(self.seed, self.request.number, self.micro_batch, {}, generator),
                            *given,
                            state,
                            *(values[v] for v in reads),
                        )
                except _Stopped as error:
                    return _where(error, module.filename, module.stages)
                values.update(zip(makes, map(_plain, made), strict=False))
        return ""

    def loss(self, *outputs: Any) -> torch.Tensor:
        """The loss, of the last stage's results."""
        return self.criterion(self.micro_batch, outputs)


def _where(error: _Stopped, filename: str, stages: Sequence[int]) -> str:
    if any(frame.f_code is _Again.loss.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        return f"the loss function makes it, of finite results of the model ({error})"
    at = place(error, filename, stages)
    return f"stage {at.stage} makes it in layer {at.layer or 'without a name'} ({at.line})"


def _ends(program: Program, stage: int) -> tuple[list[str], list[str]]:
    """The values a stage reads and makes, in the order of its functions."""
    forward = [edge for edge in program.edges if edge.forward]
    reads = dict.fromkeys(v for edge in forward if edge.target == stage for v in edge.values)
    makes = dict.fromkeys(v for edge in forward if edge.source == stage for v in edge.values)
    return list(reads), list(makes)


class _Stopped(Exception):
    """Raised at the operator looked for."""


class _Watch(TorchDispatchMode):
    """Looks at the result of every operator, or stops at one of them."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__()
        self._stop, self._count = stop, 0
        self.first_nan: int | None = None
        self.last_infinity: int | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as usual, then look."""
        name = str(func._schema.name)
        given = _tensors((args, kwargs or {}))
        was_nan, was_infinite = (any(_any(t, v) for v in given) for t in (torch.isnan, torch.isinf))
        result = func(*args, **(kwargs or {}))
        made, number = _tensors(result), self._count
        self._count += 1
        if number == self._stop:
            raise _Stopped(name)
        if self._stop is None and name not in _MASKS | _UNWRITTEN:
            if self.first_nan is None and not was_nan and any(_any(torch.isnan, v) for v in made):
                self.first_nan = number
            if given and not was_infinite and any(_any(torch.isinf, v) for v in made):
                self.last_infinity = number
        return result


def _tensors(nest: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _flat(nest) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _flat(nest: Any) -> list[Any]:
    if isinstance(nest, (tuple, list)):
        return [leaf for part in nest for leaf in _flat(part)]
    return [leaf for part in nest.values() for leaf in _flat(part)] if isinstance(nest, dict) else [nest]


def _any(test: Any, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(test(value).any())


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


__all__ = ["origin"]
