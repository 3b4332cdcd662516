"""Models to learn online, written as named steps, so that an oracle can cut them exactly where a plan does.

Every value has at most two readers: the order in which their gradients are added then makes no difference.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from oracles.learning import Part, Sample

Step = tuple[nn.Module, tuple[str, ...]]


class Steps(nn.Module):
    """A model as a list of steps: a module and the names of what it reads (``input0``, or earlier steps)."""

    def __init__(self, steps: dict[str, Step]) -> None:
        super().__init__()
        self.reads = {name: reads for name, (_, reads) in steps.items()}
        for name, (module, _) in steps.items():
            self.add_module(name, module)

    def forward(self, *inputs: Tensor) -> Tensor:
        values = {f"input{i}": value for i, value in enumerate(inputs)}
        return run(self, self.reads, values)[next(reversed(self.reads))]

    def parts(self, stages: Sequence[Sequence[str]]) -> list[Part]:
        """The model cut into stages, each a list of steps."""
        assert sorted(name for stage in stages for name in stage) == sorted(self.reads)
        return [self._part(stage, last=stage is stages[-1]) for stage in stages]

    def _part(self, stage: Sequence[str], last: bool) -> Part:
        names = [name for name in self.reads if name in stage]
        piece = nn.Module()
        for name in names:
            piece.add_module(name, getattr(self, name))
        reads = list(dict.fromkeys(r for name in names for r in self.reads[name] if r not in names))
        result = next(reversed(self.reads))
        crossing = {r for name, some in self.reads.items() if name not in names for r in some}

        def forward(values: dict[str, Tensor]) -> dict[str, Tensor]:
            made = run(piece, {name: self.reads[name] for name in names}, values)
            return {"output": made[result]} if last else {name: made[name] for name in names if name in crossing}

        piece.forward = forward
        weights = [name for name, _ in piece.named_parameters()]
        return Part(weights, reads, lambda read, values: functional_call(piece, read, (values,)), list(piece.buffers()))


def run(owner: nn.Module, steps: dict[str, tuple[str, ...]], values: dict[str, Tensor]) -> dict[str, Tensor]:
    values = dict(values)
    for name, reads in steps.items():
        values[name] = getattr(owner, name)(*(values[read] for read in reads))
    return values


def evenly(model: Steps, stages: int) -> list[list[str]]:
    """Stages of as many steps each as can be."""
    names = list(model.reads)
    return [names[i * len(names) // stages : (i + 1) * len(names) // stages] for i in range(stages)]


def as_planned(model: Steps, plan: Any) -> list[list[str]]:
    """The stages of a plan: a layer is called after the module that it is, with ``:operator`` behind it or not.

    A step that only changes the view of what it reads is no layer, and stays with the step that it reads.
    """
    stages: list[list[str]] = []
    for stage in plan.stages:
        names = [plan.layer_names[i].partition(":")[0].partition(".")[0] for i in stage.layers]
        stages.append(list(dict.fromkeys(names)))
    for name, reads in model.reads.items():
        if not any(name in stage for stage in stages):
            next(stage for stage in stages if reads[0] in stage).append(name)
    return stages


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Cat(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], 1)


def plain() -> Steps:
    """Linear layers in a row."""
    names = [f"{kind}{i}" for i in range(4) for kind in ("linear", "tanh")]
    sizes = [6, 12, 12, 12, 3]
    modules = [m for i in range(4) for m in (nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh())]
    return chain(dict(zip(names[:-1], modules[:-1], strict=True)))


def chain(modules: dict[str, nn.Module]) -> Steps:
    before = ["input0", *modules]
    return Steps({name: (module, (before[i],)) for i, (name, module) in enumerate(modules.items())})


def skip() -> Steps:
    """A U of linear layers: one skip over the middle, one over nearly everything, and the input read late."""
    return Steps(
        {
            "enter": (nn.Linear(6, 8), ("input0",)),
            "bend0": (nn.Tanh(), ("enter",)),
            "down": (nn.Linear(8, 8), ("bend0",)),
            "bend1": (nn.Tanh(), ("down",)),
            "middle": (nn.Linear(8, 8), ("bend1",)),
            "bend2": (nn.Tanh(), ("middle",)),
            "inner": (Add(), ("bend2", "bend1")),
            "up": (nn.Linear(8, 8), ("inner",)),
            "bend3": (nn.Tanh(), ("up",)),
            "outer": (Cat(), ("bend3", "bend0")),
            "late": (Cat(), ("outer", "input0")),
            "leave": (nn.Linear(22, 3), ("late",)),
        }
    )


def norms() -> Steps:
    """Convolutions with BatchNorm, running statistics and all."""
    return chain(
        {
            "conv0": nn.Conv2d(1, 4, 3, padding=1, bias=False),
            "norm0": nn.BatchNorm2d(4),
            "bend0": nn.LeakyReLU(0.1),
            "conv1": nn.Conv2d(4, 4, 3, padding=1, bias=False),
            "norm1": nn.BatchNorm2d(4),
            "bend1": nn.LeakyReLU(0.1),
            "conv2": nn.Conv2d(4, 4, 3, padding=1, stride=2, bias=False),
            "norm2": nn.BatchNorm2d(4),
            "bend2": nn.LeakyReLU(0.1),
            "flat": nn.Flatten(),
            "head": nn.Linear(36, 3),
        }
    )


@dataclass(frozen=True)
class Lesson:
    """A model, the shape of one sample's input, and the loss; targets come from a teacher of the same kind."""

    name: str
    build: Callable[[], Steps]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float32) -> Steps:
        """The same weights every time."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        return self.build().to(dtype).train()

    def samples(self, count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Sample]:
        """A smooth random walk of inputs, and what a fixed linear map makes of each."""
        generator = torch.Generator().manual_seed(seed)
        x, found = torch.randn(self.shape, generator=generator), list[Sample]()
        teacher = torch.randn(x[0].numel(), 3, generator=generator) / 3
        for _ in range(count):
            x = 0.8 * x + 0.6 * torch.randn(self.shape, generator=generator)
            found.append(((x.to(dtype),), (x.flatten(1) @ teacher).tanh().to(dtype)))
        return found


LESSONS = {
    lesson.name: lesson
    for lesson in (
        Lesson("plain", plain, (1, 6)),
        Lesson("skip", skip, (1, 6)),
        Lesson("norms", norms, (1, 1, 6, 6)),
    )
}
