"""A mixed integer program of a placement: columns, rows, and what its solutions stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pipecompile.passes.partition.problem import Arrangement, Assignment, Placement, Problem
from pipecompile.passes.partition.windows import Windows

#: The objective's limit in the units of the model: solvers' tolerances are absolute.
SCALE = 100.0

#: How far above the incumbent a solution may be, so that rounding does not make it infeasible.
ROOM = 1e-6

#: The column of the objective.
TOP = 0


@dataclass
class Affine:
    """A constant plus coefficients by column."""

    terms: dict[int, float] = field(default_factory=dict[int, float])
    const: float = 0.0

    def add(self, other: Affine, factor: float = 1.0) -> Affine:
        """Add ``factor`` x ``other`` in place."""
        self.const += factor * other.const
        for column, coefficient in other.terms.items():
            total = self.terms.get(column, 0.0) + factor * coefficient
            if total:
                self.terms[column] = total
            else:
                self.terms.pop(column, None)
        return self


@dataclass
class Model:
    """Minimise column ``TOP`` subject to ``rows`` (each at most 0). Seconds are x ``scale``."""

    problem: Problem
    arrangement: Arrangement
    windows: Windows
    scale: float
    empties: bool = False
    """Whether stages may be empty (and are then no stages)."""
    lower: list[float] = field(default_factory=list[float])
    upper: list[float] = field(default_factory=list[float])
    rows: list[Affine] = field(default_factory=list[Affine])
    choices: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """Columns of the undecided y[layer, stage]: the integer ones."""
    impossible: bool = False
    """Whether a row without columns cannot hold."""

    @cached_property
    def decided(self) -> list[int | None]:
        """The stage of each layer whose window leaves no choice; None of the others."""
        return [a if a == b else None for a, b in zip(self.windows.first, self.windows.last, strict=True)]

    def column(self, lower: float = 0.0, upper: float = 1.0) -> int:
        """A new column within the bounds."""
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def below(self, layer: int, stage: int) -> Affine:
        """``y``: 1 where the layer lies in one of the stages 0 .. ``stage``."""
        column = self.choices.get((layer, stage))
        if column is not None:
            return Affine({column: 1.0})
        return Affine(const=float(stage >= self.windows.last[layer]))

    def inside(self, layer: int, stage: int) -> Affine:
        """``x``: 1 where the layer lies in the stage."""
        only = self.decided[layer]
        if only is not None:
            return Affine(const=float(stage == only))
        return self.below(layer, stage).add(self.below(layer, stage - 1), -1.0)

    def reach(self, layer: int) -> range:
        """Stages the layer can lie in."""
        return range(self.windows.first[layer], self.windows.last[layer] + 1)

    def require(self, row: Affine) -> None:
        """Demand ``row <= 0``; trivially true rows are left out, impossible ones noted."""
        if not row.terms and row.const > 0:
            self.impossible = True
        elif row.const + sum(c * (self.upper if c > 0 else self.lower)[i] for i, c in row.terms.items()) > 0:
            self.rows.append(row)

    def at_least(self, column: int, amount: Affine) -> None:
        """Demand that the column be at least ``amount``."""
        self.require(Affine({column: -1.0}).add(amount))

    def read(self, values: Sequence[float]) -> Placement:
        """The placement a solution stands for: each layer's position is the stages it is not yet in."""
        at = [
            self.windows.first[v]
            + sum(values[self.choices[v, s]] < 0.5 for s in range(self.windows.first[v], self.windows.last[v]))
            for v in range(self.problem.layers)
        ]
        used = sorted(set(at))
        return Placement(tuple(used.index(s) for s in at), tuple(self.arrangement[s] for s in used))

    def write(self, positions: Assignment) -> dict[int, float]:
        """Values of the integer columns for layers at these positions, which lie within the windows."""
        return {column: float(positions[v] <= s) for (v, s), column in self.choices.items()}

    def positions(self, placement: Placement) -> Assignment | None:
        """Where this arrangement has the placement's stages; None if it is outside the model."""
        if not self.empties and len(placement.devices) < len(self.arrangement):
            return None
        at = list[int]()
        for devices in placement.devices:
            start = at[-1] + 1 if at else 0
            if devices not in self.arrangement[start:]:
                return None
            at.append(self.arrangement.index(devices, start))
        found = tuple(at[stage] for stage in placement.stage_of)
        inside = all(a <= s <= b for a, s, b in zip(self.windows.first, found, self.windows.last, strict=True))
        return found if inside else None


__all__ = ["ROOM", "SCALE", "TOP", "Affine", "Model"]
