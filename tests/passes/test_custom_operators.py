"""Modules that register the custom operators of a graph."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from pipecompile.passes.custom_operators import imports_of


@torch.library.custom_op("judged::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """Made in a module that workers can import."""
    return x * 2


def test_the_module_of_a_custom_operator_is_found_in_nested_graphs_too() -> None:
    inner, outer = fx.Graph(), fx.Graph()
    inner.output(inner.call_function(torch.ops.judged.twice.default, (inner.placeholder("x"),)))
    outer.output(outer.call_function(operator.neg, (outer.placeholder("x"),)))
    module = fx.GraphModule(nn.Module(), outer)
    assert imports_of(module, ["mine"]) == ("mine",)
    module.add_submodule("inner", fx.GraphModule(nn.Module(), inner))
    module.graph.get_attr("inner")
    assert imports_of(module, ["mine"]) == ("mine", __name__)
    assert imports_of(fx.GraphModule(nn.Module(), fx.Graph()), []) == ()


def test_operators_of_torch_need_no_import() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),)))
    assert imports_of(fx.GraphModule(nn.Module(), graph), []) == ()
