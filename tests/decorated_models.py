"""Decorated models, in a file of their own: a class counts as depending on its mode where its file speaks of it."""

from __future__ import annotations

import torch
from torch import nn

import pipecompile

FAST = {"devices": 2, "executor": "inline", "profile_seconds": 0.05}


@pipecompile.pipeline(**FAST)
class Net(nn.Module):
    """Linear, so that everything is quick; ``gain`` is a constant of the graph."""

    def __init__(self, width: int = 8, gain: float = 2.0) -> None:
        super(Net, self).__init__()  # noqa: UP008 - the old form must work too
        torch.manual_seed(0)
        self.first, self.second, self.gain = nn.Linear(width, width), nn.Linear(width, width), gain

    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        out = self.second(torch.relu(self.first(x))) * self.gain
        return -out if flag else out


class Twice(Net):
    """Overrides forward and uses the one it inherits."""

    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        return super().forward(x) + super().forward(x + 1)


class Same(Net):
    """Inherits forward."""


@pipecompile.pipeline(devices=1, executor="inline", profile_seconds=0.05)
class Redecorated(Net):
    def forward(self, x: torch.Tensor, flag: bool = False) -> torch.Tensor:
        return super().forward(x) * 3


@pipecompile.pipeline(**FAST)
class Outer(nn.Module):
    """Holds a decorated module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Net(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


class Plain(nn.Module):
    """Holds a decorated module, is not decorated itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Net(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


@pipecompile.pipeline(**FAST)
class Dropping(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))


@pipecompile.pipeline(**FAST, example_inputs=torch.zeros(2, 8))
class Prepared(Net):
    pass


@pipecompile.pipeline(**FAST, new_shape="refuse")
class Strict(Net):
    pass


@pipecompile.pipeline(devices=2, profile_seconds=0.05)
class Working(Net):
    """With real workers."""


@pipecompile.pipeline
class Bare(Net):
    """Without parentheses."""


class Registered:
    seen: list[str] = []  # noqa: RUF012 - filled by __init_subclass__

    def __init_subclass__(cls, label: str = "", **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Registered.seen.append(label or cls.__name__)


@pipecompile.pipeline(**FAST)
class WithRegistry(Registered, Net, label="registered"):
    pass
