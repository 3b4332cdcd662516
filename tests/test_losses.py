"""Losses at named layers and between samples, and batches of the latest ones: as in a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from learners import SGD, learning, network, same, stream
from pipecompile.errors import InputError
from pipecompile.losses import Coherent, Tapped
from pipecompile.sources import Replay


def both(result: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(result["output"], target) + 0.3 * result["a"].square().mean()


def plain(model: nn.Module, samples: Any, loss_fn: Any) -> dict[str, Any]:
    update = SGD(list(model.train().parameters()))
    for x, y in samples:
        result = model(x)
        if y is not None:
            update.zero_grad()
            loss_fn(result, y).backward()
            update.step()
    return dict(model.state_dict())


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_loss_at_a_layer_of_an_early_stage() -> None:
    wanted = plain(Tapped(network(), ["a"]), stream(6), both)
    with learning(Tapped(network(), ["a"]), 3, "sync", loss_fn=both) as pipe:
        results = list(pipe.learn(stream(6)))
        assert set(results[0].output) == {"output", "a"}
        assert same(pipe.state_dict(), wanted)
        early = next(edge for edge in pipe.program.edges if edge.source == 2 and edge.target == 0)
        assert early.backward
    with pytest.raises(InputError, match="Skip has no layer 'z'; there are first, norm"):
        Tapped(network(), ["z"])


def test_results_that_should_change_slowly() -> None:
    model, before = network().train(), None
    update = SGD(list(model.parameters()))
    for x, y in stream(6):
        result = model(x)
        loss = nn.functional.cross_entropy(result, y)
        if before is not None:
            loss = loss + 0.5 * ((result - before) ** 2).mean()
        before = result.detach()
        update.zero_grad()
        loss.backward()
        update.step()
    loss_fn = Coherent(nn.functional.cross_entropy, 0.5)
    with learning(network(), 3, "sync", loss_fn=loss_fn, example_targets=stream(1)[0][1]) as pipe:
        list(pipe.learn(stream(6)))
        for name, value in model.state_dict().items():
            assert torch.allclose(pipe.state_dict()[name], value, rtol=1e-12, atol=1e-14)


def test_a_sliding_batch_of_the_latest_samples() -> None:
    singles = [(torch.tensor([[float(i)]]), None if i == 3 else torch.tensor([i])) for i in range(6)]
    batches = list(Replay(iter(singles), 3))
    found = [x.flatten().tolist() for x, _ in batches]
    assert found == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [1, 2, 4], [2, 4, 5]]
    assert [None if y is None else y.tolist() for _, y in batches] == [*found[:3], None, *found[4:]]
    pairs = [(x[i : i + 1], y[i : i + 1]) for x, y in stream(3) for i in range(4)]
    wanted = plain(network(), Replay(pairs, 4), nn.functional.cross_entropy)
    with learning(network(), 2, "sync") as pipe:
        list(pipe.learn(Replay(pairs, 4)))
        assert same(pipe.state_dict(), wanted)
    assert pipecompile.losses.Tapped is Tapped
