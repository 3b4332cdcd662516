"""A compiled model: generated modules, plan, program and the shape of its interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipecompile.ir.graph import OutputRef, StateSpec, Symbol, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Program
from pipecompile.ir.tree import Tree


@dataclass(frozen=True)
class DeviceModule:
    """The generated Python module of one device.

    ``state`` lists, by placeholder name, the tensors ``link.state()`` must return, in order.
    ``filename`` is what tracebacks show; it exists on disk only for a saved pipeline. It handles the
    samples ``replica``, ``replica + replicas`` and so on.
    """

    device: int
    stages: tuple[int, ...]
    source: str
    filename: str
    state: tuple[str, ...]
    replica: int = 0
    replicas: int = 1


@dataclass(frozen=True)
class Package:
    """Everything but the weights that a runtime needs to run a compiled model."""

    model: str
    modules: tuple[DeviceModule, ...]
    plan: Plan
    program: Program
    state: tuple[StateSpec, ...]
    inputs: tuple[TensorSpec, ...]
    input_names: tuple[str, ...]
    outputs: tuple[OutputRef, ...]
    in_tree: Tree
    out_tree: Tree
    symbols: Mapping[str, Symbol] = field(default_factory=dict[str, Symbol])
    parameters: tuple[str, ...] = ()
    """Names of ``forward``'s parameters, in order, so that a call may name what the example did not."""
    imports: tuple[str, ...] = ()
    """Modules a worker imports first, because they register custom operators."""
