"""What a model of the zoo is: a name, a builder and why it is there."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
Built = tuple[nn.Module, list[Call]]


@dataclass(frozen=True)
class Case:
    """One model with the calls it is tried on.

    ``core`` cases run in ``make test``, all of them in ``make verify``. ``calls`` differ from one
    another in values only, so that a result kept from an earlier sample is noticed. ``refused``
    says why a model cannot be captured; compiling it must then raise, not go wrong. ``imports``
    names modules that register the custom operators it uses.
    """

    name: str
    build: Callable[[], Built]
    core: bool = False
    notes: str = ""
    refused: str = ""
    imports: tuple[str, ...] = ()

    def make(self) -> Built:
        """The model in eval mode and its calls; the same values every time."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        model, calls = self.build()
        return model.eval(), calls

    def __str__(self) -> str:
        return self.name


CASES: dict[str, Case] = {}


def case(
    name: str, *, core: bool = False, notes: str = "", refused: str = "", imports: tuple[str, ...] = ()
) -> Callable[[Callable[[], Built]], Callable[[], Built]]:
    """Enter the decorated builder into the zoo."""

    def enter(build: Callable[[], Built]) -> Callable[[], Built]:
        assert name not in CASES, name
        CASES[name] = Case(name, build, core, notes, refused, imports)
        return build

    return enter


def positional(make: Callable[[], Any], count: int = 3) -> list[Call]:
    """``count`` calls with fresh positional arguments (a tuple) or one argument (anything else)."""

    def arguments() -> Iterator[tuple[Any, ...]]:
        for _ in range(count):
            made = make()
            yield made if isinstance(made, tuple) else (made,)

    return [(args, {}) for args in arguments()]


def keywords(make: Callable[[], dict[str, Any]], count: int = 3) -> list[Call]:
    """``count`` calls with fresh keyword arguments."""
    return [((), make()) for _ in range(count)]
