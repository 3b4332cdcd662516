"""Profile: time every layer in its place in the whole model, and note the bytes that cross.

Repeating a layer alone keeps its weights in cache: a 16-layer MLP was predicted four times too
fast that way. So the whole model runs in order, with a clock read after each layer.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from pipecompile.ir.graph import ModelGraph, TensorSpec
from pipecompile.ir.measure import Job, Measure
from pipecompile.ir.profile import Profile
from pipecompile.passes.codegen import Codegen
from pipecompile.passes.emit import Emitter
from pipecompile.passes.observe import copies


@dataclass(frozen=True)
class ProfileLayers:
    """Measure a graph for about ``budget`` seconds on one device."""

    budget: float = 2.0

    def digest(self, graph: ModelGraph, module: fx.GraphModule) -> str:
        """Fingerprint of what a profile depends on: code, shapes, dtypes, processor and torch version."""
        source, state = Codegen().model_function(Emitter(graph, module))
        sizes = {entry.name: entry.nbytes for entry in graph.state}
        parts = [source, *(f"{name}:{sizes[name]}" for name in state)]
        parts += [f"{name}:{graph.values[name]}" for name in graph.inputs if name in graph.values]
        parts += [_processor(), torch.__version__, platform.python_version(), str(self.budget)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def apply(
        self,
        graph: ModelGraph,
        module: fx.GraphModule,
        tensors: Mapping[str, torch.Tensor],
        leaves: Sequence[Any],
        measure: Measure,
    ) -> Profile:
        """Time the model on the example ``leaves``. State it writes to is copied first."""
        source, names = Codegen().model_function(Emitter(graph, module))
        state = state_for_timing(graph, tensors, names)
        seconds, total, repeats = measure.layers(source, [*state, *copies(leaves)], len(graph.layers), self.budget)
        sizes = {name: spec.nbytes for name, spec in graph.values.items()}
        for name, leaf in zip(graph.inputs, leaves, strict=True):
            sizes.setdefault(name, TensorSpec.of(leaf).nbytes)
        return Profile(tuple(seconds), sizes, measure.link(), total, repeats, self.digest(graph, module))


def whole_model(
    graph: ModelGraph, module: fx.GraphModule, tensors: Mapping[str, torch.Tensor], leaves: Sequence[Any]
) -> Job:
    """The whole model on the example ``leaves``, to time beside its stages."""
    source, names = Codegen().model_function(Emitter(graph, module))
    return Job(source, "model", [_no_clock, *state_for_timing(graph, tensors, names), *copies(leaves)])


def _no_clock(_layer: int) -> None:
    pass


def state_for_timing(graph: ModelGraph, tensors: Mapping[str, torch.Tensor], names: Sequence[str]) -> list[Any]:
    """The named state, with copies of what the model writes to."""
    written = {entry.name for entry in graph.state if entry.mutated}
    return [copies([tensors[name]])[0] if name in written else tensors[name] for name in names]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
