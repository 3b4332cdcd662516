"""Which modules workers must import for the custom operators of a graph.

The one place that reads torch's list of what ``torch.library.custom_op`` made; there is no public way to ask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx
from torch._library.custom_ops import OPDEFS

from pipecompile.passes.operators import operator_name


def imports_of(module: fx.GraphModule, given: Sequence[str]) -> tuple[str, ...]:
    """The modules ``given``, and those that made operators which the graph calls; not a script that is run."""
    found = dict.fromkeys(given)
    graphs = [inner.graph for inner in module.modules() if isinstance(inner, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        made: Any = OPDEFS.get(operator_name(node))
        home = "__main__" if made is None else str(made._init_fn.__module__)
        if home != "__main__" and home.partition(".")[0] != "torch":
            found[home] = None
    return tuple(found)


__all__ = ["imports_of"]
