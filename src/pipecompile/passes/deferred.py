"""Find the BatchNorms of a captured graph whose running statistics can be updated once a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from pipecompile.ir.graph import ModelGraph

_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Norm:
    """One BatchNorm in train mode: its number in the graph, its running statistics by placeholder name."""

    number: int
    mean: str
    var: str
    momentum: float


def deferred_norms(graph: ModelGraph) -> tuple[dict[fx.Node, Norm], dict[fx.Node, str]]:
    """BatchNorms that update running statistics, and the operators that count their batches by counter."""
    norms: dict[fx.Node, Norm] = {}
    owners: set[str] = set()
    names = {entry.name: entry.fqn for entry in graph.state}
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        mean, var, training, momentum = node.args[3:7]
        if training is True and isinstance(mean, fx.Node) and isinstance(var, fx.Node) and mean.name in names:
            assert isinstance(momentum, (int, float))
            norms[node] = Norm(len(norms), mean.name, var.name, float(momentum))
            owners.add(names[mean.name].rpartition(".")[0])
    counters: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        if node.target is not torch.ops.aten.add_.Tensor or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        counter: str = counters[before] if before in counters else before.name
        owner, _, what = names.get(counter, "").rpartition(".")
        if what == _COUNTER and owner in owners:
            counters[node] = counter
    return norms, counters


__all__ = ["Norm", "deferred_norms"]
