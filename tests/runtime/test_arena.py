from __future__ import annotations

import copy
import gc
import io
import os
import pickle

import pytest
import torch
from torch import nn

from pipecompile.errors import PipecompileError
from pipecompile.runtime.arena import Weights, adopt, open_state


def other_side(weights: Weights, names: list[str]) -> dict[str, torch.Tensor]:
    """What a worker maps (second mapping of the same memory)."""
    fds = [arena.fd for arena in weights.arenas]
    return dict(zip(names, open_state(fds, weights.describe(names)), strict=True))


def odd_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    return {
        "tied": base,
        "part": base[4:16].view(3, 4).t(),
        "parameter": nn.Parameter(torch.randn(5, 3)),
        "half": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "wide": torch.ones(1, 2).expand(3, 2),
        "complex": torch.randn(2, dtype=torch.complex64),
    }


def test_layout_identity_and_values_survive_on_both_sides() -> None:
    tensors = odd_tensors()
    before = {name: (id(t), t.detach().clone(), t.stride(), t.storage_offset()) for name, t in tensors.items()}
    weights = adopt(tensors)
    mapped = other_side(weights, list(tensors))
    for name, tensor in tensors.items():
        identity, value, stride, offset = before[name]
        assert id(tensor) == identity
        for seen in (tensor, mapped[name]):
            assert torch.equal(seen, value)
            assert seen.stride() == stride
            assert seen.storage_offset() == offset or not seen.numel()
            assert seen.dtype == value.dtype
        if tensor.numel():
            assert tensor.data_ptr() != mapped[name].data_ptr()
            assert tensor.untyped_storage().data_ptr() % 64 == 0
    assert isinstance(tensors["parameter"], nn.Parameter)
    assert tensors["parameter"].requires_grad


def test_ties_and_changes_are_shared_both_ways() -> None:
    tensors = odd_tensors()
    mapped = other_side(adopt(tensors), list(tensors))
    tensors["tied"][4] = 100.0
    assert tensors["part"][0, 0] == mapped["part"][0, 0] == mapped["tied"][4] == 100.0
    mapped["part"][0, 0] = -1.0
    assert tensors["tied"][4] == -1.0
    with torch.no_grad():
        tensors["parameter"].fill_(2.0)
    assert torch.equal(mapped["parameter"], torch.full((5, 3), 2.0))


def test_models_still_train_copy_and_save() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    reference = copy.deepcopy(model)
    second = torch.optim.Adam(reference.parameters(), lr=0.1)
    weights = adopt(dict(model.state_dict(keep_vars=True)))
    x = torch.randn(4, 3)
    for net, steps in ((model, optimizer), (reference, second)):
        net(x).sum().backward()
        steps.step()
    for mine, theirs in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert weights.detached(dict(model.state_dict(keep_vars=True))) == []
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[2].weight is copied[0].weight
        assert torch.equal(copied[0].weight, model[0].weight)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert file.tell() < 20_000
    file.seek(0)
    assert torch.equal(torch.load(file)["2.weight"], model[0].weight)


def test_a_second_pipeline_uses_the_same_memory() -> None:
    tensors = {"a": torch.randn(4), "b": torch.randn(4)}
    first = adopt({"a": tensors["a"]})
    place = tensors["a"].data_ptr()
    second = adopt(tensors)
    assert tensors["a"].data_ptr() == place
    one, two = other_side(first, ["a"]), other_side(second, ["a", "b"])
    tensors["a"].fill_(5.0)
    tensors["b"].fill_(6.0)
    assert one["a"].eq(5).all()
    assert two["a"].eq(5).all()
    assert two["b"].eq(6).all()
    assert len(second.arenas) == 2
    assert first.arenas[0] in second.arenas


def test_memory_is_kept_by_tensors_and_descriptors_by_pipelines() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    tensors = {"a": torch.arange(5.0)}
    weights = adopt(tensors)
    del weights
    gc.collect()
    assert torch.equal(tensors["a"], torch.arange(5.0))
    again = adopt(tensors)
    assert torch.equal(other_side(again, ["a"])["a"], torch.arange(5.0))
    del again, tensors
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_detached_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def state() -> dict[str, torch.Tensor]:
        return dict(model.state_dict(keep_vars=True))

    weights = adopt(state())
    model.load_state_dict({name: torch.ones_like(t) for name, t in state().items()})
    assert weights.detached(state()) == []
    model[1].load_state_dict({name: t.clone() for name, t in model[1].state_dict().items()}, assign=True)
    assert weights.detached(state()) == ["1.weight", "1.bias"]
    model.double()
    assert weights.detached(state()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "layout"),
        (torch.randn(2, dtype=torch.complex64).conj(), "conjugated"),
    ],
)
def test_refused_weights_are_named_and_nothing_moves(tensor: torch.Tensor, reason: str) -> None:
    fine = torch.ones(3)
    place = fine.data_ptr()
    with pytest.raises(PipecompileError, match=f"'odd'.*{reason}"):
        adopt({"fine": fine, "odd": tensor})
    assert fine.data_ptr() == place


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        expected = model(torch.ones(1, 2))
    weights = adopt(dict(model.named_parameters()))
    assert torch.equal(other_side(weights, ["weight"])["weight"], model.weight)
    assert model.weight.is_inference()
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 2)), expected)
