"""Tells when a torch internal that the adapter uses has moved."""

from __future__ import annotations

import torch
from torch import fx, nn

from pipecompile.passes import operators


def call(target: object, *args: object) -> fx.Node:
    graph = fx.Graph()
    return graph.call_function(
        target, tuple(graph.placeholder(f"x{i}") if a is None else a for i, a in enumerate(args))
    )


def test_schemas_are_where_the_adapter_looks() -> None:
    add_ = torch.ops.aten.add_.Tensor
    node = call(add_, None, None)
    assert operators.is_operator(add_)
    assert not operators.is_operator(torch.add)
    assert operators.operator_name(node) == "aten::add_"
    assert operators.qualified_name(add_) == ("aten", "add_", "Tensor")
    assert operators.argument_names(add_) == ["self", "other", "alpha"]
    assert [n.name for n in operators.written_args(node)] == ["x0"]
    assert operators.written_args(call(torch.ops.aten.add.Tensor, None, None)) == []
    assert operators.out_of_place(node) is torch.ops.aten.add.Tensor
    assert operators.out_of_place(call(torch.ops.aten.add.Tensor, None, None)) is None
    assert operators.returns_alias(call(torch.ops.aten.view.default, None, [1]))
    assert not operators.returns_alias(call(torch.ops.aten.mul.Tensor, None, None))


def test_random_operators_are_tagged() -> None:
    assert operators.is_random(torch.ops.aten.rand.default)
    assert operators.is_random(torch.ops.aten.dropout.default)
    assert not operators.is_random(torch.ops.aten.add.Tensor)


def test_higher_order_operators_are_known() -> None:
    assert operators.is_higher_order(torch.ops.higher_order.cond)
    assert not operators.is_higher_order(torch.ops.aten.add.Tensor)


def test_module_dicts_are_the_module_s_own() -> None:
    module = nn.BatchNorm1d(3)
    operators.buffers_of(module)["running_mean"] = torch.full((3,), 7.0)
    assert module.running_mean is operators.buffers_of(module)["running_mean"]
    assert set(operators.parameters_of(module)) == {"weight", "bias"}


def test_code_inside_believes_it_runs_eagerly() -> None:
    seen: list[tuple[bool, bool]] = []

    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((torch.compiler.is_exporting(), torch.compiler.is_compiling()))
            with operators.not_exporting():
                seen.append((torch.compiler.is_exporting(), torch.compiler.is_compiling()))
            return x + 1

    torch.export.export(Asks(), (torch.ones(2),), strict=False)
    assert seen[0] == (True, True)
    assert seen[1] == (False, False)
    assert not torch.compiler.is_exporting()
