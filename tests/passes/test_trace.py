"""What the captured graph and its layers look like, and what is said when capture fails."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from pipecompile.errors import InputError, TraceError
from pipecompile.ir.graph import ModelGraph
from pipecompile.passes.trace import Trace
from pipecompile.passes.trace_step import TraceStep


def graph_of(model: nn.Module, *args: Any, leaf: tuple[Any, ...] = (), **kwargs: Any) -> ModelGraph:
    return Trace(leaf=leaf).apply(model, args, kwargs).graph


def layer_of(graph: ModelGraph, node: str) -> str:
    return next(layer.name for layer in graph.layers if node in layer.nodes)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x += self.second(x).relu()
        return x


def test_layers_carry_module_paths_and_source_lines() -> None:
    graph = graph_of(Residual(), torch.randn(2, 8))
    assert [layer.name for layer in graph.layers] == ["first", "second", "relu", "add"]
    assert all(re.fullmatch(r"test_trace\.py:\d+", layer.source) for layer in graph.layers)
    assert graph.layers[0].state == ("p_first_weight", "p_first_bias")
    assert graph.layers[0].reads == ("x",)


def test_a_residual_written_in_place_does_not_merge_the_block() -> None:
    assert len(graph_of(Residual(), torch.randn(2, 8)).layers) == 4


def test_edges_follow_program_order() -> None:
    graph = graph_of(Residual(), torch.randn(2, 8))
    assert all(producer < consumer for producer, consumer in graph.edges)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(6, 18)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).view(2, 3, 6).transpose(0, 1).unbind(0)
        return q * k + v


def test_views_stay_with_what_they_view() -> None:
    graph = graph_of(Views(), torch.randn(2, 6))
    assert {layer_of(graph, n) for n in ("linear", "view", "transpose", "unbind", "getitem")} == {"project"}


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x - self.mean)
        self.mean = 0.9 * self.mean + 0.1 * x
        return y * self.mean


def test_all_uses_of_a_written_buffer_are_one_layer() -> None:
    model = Counter()
    graph = graph_of(model, torch.randn(4))
    users = [layer for layer in graph.layers if "b_mean" in layer.state]
    assert len(users) == 1
    assert [entry.mutated for entry in graph.state if entry.fqn == "mean"] == [True]
    assert torch.equal(model.mean, torch.zeros(4)), "tracing must leave the buffer as it was"


class Masked(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(4, 4).tril() == 0
        return x.masked_fill(mask, 0.0).relu().masked_fill(mask, 1.0)


def test_nodes_without_inputs_are_free() -> None:
    graph = graph_of(Masked(), torch.randn(4, 4))
    assert {"tril", "eq"} <= graph.free
    assert not any(set(layer.nodes) & graph.free for layer in graph.layers)
    assert not any(set(layer.reads) & graph.free for layer in graph.layers)


class Random(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(3)


def test_random_numbers_are_not_free() -> None:
    assert not graph_of(Random(), torch.randn(3)).free


@pytest.mark.parametrize("leaf", [("body.*",), (nn.Sequential,)])
def test_leaf_modules_stay_whole(leaf: tuple[Any, ...]) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.body:
                x = part(x)
            return x

    assert len(graph_of(Nested(), torch.randn(4)).layers) == 9
    assert len(graph_of(Nested(), torch.randn(4), leaf=leaf).layers) == 3


def test_mode_and_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    model[1].eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    graph = graph_of(model, torch.randn(4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(2), expected)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert [layer.name for layer in graph.layers] == ["0"], "dropout does nothing in eval"


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.sum() > 0:  # the line to be named
            return y
        return -y


def test_data_dependent_branch_is_refused_with_its_line() -> None:
    with pytest.raises(TraceError) as caught:
        graph_of(Branch(), torch.ones(3))
    text = str(caught.value)
    assert "test_trace.py" in text
    assert "if y.sum() > 0" in text
    assert "torch.where" in text


class Forgetful(nn.Module):
    """Counts in Python, which capture freezes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.front, self.scale = nn.Linear(3, 3), Scale(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale(self.front(x))


class Scale(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.owner[0].count += 1
        return x * self.owner[0].count


def test_a_python_counter_is_found_and_its_layer_named() -> None:
    with pytest.raises(TraceError, match="differs from eager") as caught:
        graph_of(Forgetful(), torch.ones(3))
    assert "'scale'" in str(caught.value)


class Grows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = torch.cat([self.cache, x])
        return self.cache.sum(0)


def test_a_growing_buffer_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match="cache"):
        graph_of(Grows(), torch.ones(1, 3))


def test_a_model_that_fails_eagerly_says_so() -> None:
    with pytest.raises(TraceError, match="fails in plain PyTorch"):
        graph_of(nn.Linear(3, 3), torch.ones(4))


def test_inputs_elsewhere_are_refused() -> None:
    with pytest.raises((InputError, TraceError)):
        graph_of(nn.Linear(3, 3), torch.ones(3, device="meta"))


def test_unknown_dynamic_shape_is_refused() -> None:
    with pytest.raises(InputError, match="nonsense"):
        Trace(dynamic_shapes={"nonsense": {0: torch.export.Dim.AUTO}}).apply(nn.Linear(3, 3), (torch.ones(2, 3),), {})


def test_dynamic_sizes_are_recorded_with_their_range() -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    traced = Trace(dynamic_shapes=({0: batch},)).apply(nn.Linear(3, 5), (torch.ones(4, 3),), {})
    (symbol,) = traced.graph.symbols.values()
    assert (symbol.input, symbol.dim, symbol.high) == (0, 0, 64)
    (value,) = [spec for name, spec in traced.graph.values.items() if name == "linear"]
    assert value.dynamic


def test_sizes_shared_by_inputs_are_checked_in_every_call() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x + y[: x.shape[0]], x.shape[0]

    length = torch.export.Dim("length", min=2, max=9)
    shapes = {"x": {0: length}, "y": {0: 2 * length}}
    traced = Trace(dynamic_shapes=shapes).apply(Two(), (torch.ones(3), torch.ones(6)), {})
    (symbol,) = traced.graph.symbols.values()
    assert [place[:2] for place in symbol.also] == [(1, 0)]


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), torch.zeros(2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        self.last += 1
        return self.layer(x) + self.last


def test_tracing_leaves_weights_and_attributes_as_they_were() -> None:
    model = Remembers()
    weight, last = model.layer.weight.detach().clone(), model.last
    traced = Trace().apply(model, (torch.ones(2, 3),), {})
    assert torch.equal(model.layer.weight, weight)
    assert model.last is last
    assert not last.any()
    assert {entry.fqn for entry in traced.graph.state if entry.mutated} == {"layer.weight", "last"}


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1]


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (Packed(), (torch.randn(2, 4, 3), torch.tensor([4, 2])), "where: +.*pack_padded_.*try: +a packed sequence"),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 1, enable_nested_tensor=False),
            (torch.randn(3, 1, 4), torch.full((3, 3), -torch.inf).triu(1)),
            "try: +say whether the mask is causal: is_causal=",
        ),
    ],
)
def test_what_torchs_own_layers_decide_by_values_is_explained(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], said: str
) -> None:
    with pytest.raises(TraceError, match=rf"(?s){said}"):
        Trace().apply(model, inputs, {})


def test_a_layer_of_torch_is_named_where_no_line_of_the_model_can_be() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None))
    with pytest.raises(TraceError, match=r"where: +layer '1' \(BatchNorm1d\)\n +try: +momentum=None averages"):
        TraceStep().trace(model, (torch.randn(4, 3),), {})
