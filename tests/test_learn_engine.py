"""Learning on a stream in one process: plain online SGD where nothing is late, delays as said, nothing lost."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from learners import CLOCKS, RULES, SGD, Sample, learning, network, same, stream
from pipecompile.errors import InputError, Overloaded, PipecompileWarning, PipelineClosed, PlanError, StepError

N = 12


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def online(samples: list[Sample], optimizer: Any = SGD, group: int = 1) -> tuple[dict[str, Any], list[float | None]]:
    """Plain PyTorch: a forward, a backward and, after each ``group`` samples, an update with the mean gradient."""
    model = network().train()
    update, losses = optimizer(list(model.parameters())), list[float | None]()
    for first in range(0, len(samples), group):
        update.zero_grad()
        found = 0
        for x, y in samples[first : first + group]:
            result = model(x)
            losses.append(None)
            if y is not None:
                loss = nn.functional.cross_entropy(result, y)
                losses[-1] = loss.item()
                loss.backward()
                found += 1
        for p in model.parameters():
            if p.grad is not None and found > 1:
                p.grad /= found
        if found:
            update.step()
    return dict(model.state_dict()), losses


@pytest.mark.parametrize("updates", RULES)
def test_one_stage_is_plain_online_sgd_bit_for_bit(updates: str) -> None:
    wanted, losses = online(stream(N))
    with learning(network(), 1, updates) as pipe:
        found = list(pipe.learn(stream(N)))
        assert [r.loss for r in found] == losses
        assert same(pipe.state_dict(), wanted)


@pytest.mark.parametrize(("stages", "group", "count"), [(3, 1, 7), (3, 4, 10), (2, 3, 3)])
def test_sync_is_plain_online_sgd_over_any_stages(stages: int, group: int, count: int) -> None:
    """The last update has fewer samples; some have no target, and the mean is over the others."""
    samples = stream(count, without=(1, 5))
    wanted, losses = online(samples, group=group)
    with learning(network(), stages, "sync", accumulate=group) as pipe:
        assert [r.loss for r in pipe.learn(samples)] == losses
        assert same(pipe.state_dict(), wanted)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("updates", RULES)
def test_every_forward_reads_the_version_it_should_and_every_stage_learns(updates: str, clock: str) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with learning(model, 3, updates, clock=clock) as pipe:
        found = list(pipe.learn(stream(N)))
        assert [r.seq for r in found] == list(range(N))
        assert [r.versions for r in found] == [tuple(pipe.rule.version(k, s, 3) for s in range(3)) for k in range(N)]
        ahead = {"1f1b": [2, 1, 0], "lockstep": [4, 2, 0]}[clock]
        if updates in ("weight_stashing", "stale", "sideways"):
            assert found[-1].versions == tuple(N - 1 - w for w in ahead)
        assert pipe.snapshot()["updates"] == -(-N // pipe.rule.accumulate)
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), f"{name} never moved"


def test_the_rules_differ_from_each_other() -> None:
    results: list[dict[str, Any]] = []
    for updates in RULES:
        with learning(network(), 3, updates) as pipe:
            list(pipe.learn(stream(N)))
            results.append(dict(pipe.state_dict()))
    assert not any(same(one, other) for i, one in enumerate(results) for other in results[:i])


@pytest.mark.parametrize("updates", RULES)
def test_at_rate_zero_on_a_constant_stream_gradients_are_true_whatever_the_rule(updates: str) -> None:
    """Seen in the momentum that plain SGD would have: weights and activations never differ."""
    rate_zero = partial(torch.optim.SGD, lr=0.0, momentum=1.0)
    samples = stream(1) * 6
    model = network()
    plain = rate_zero(list(model.parameters()))
    for x, y in samples:
        plain.zero_grad()
        nn.functional.cross_entropy(model.train()(x), y).backward()
        plain.step()
    with learning(network(), 3, updates, optimizer=rate_zero, accumulate=6) as pipe:
        list(pipe.learn(samples))
        state = pipe.snapshot()["optimizer"]["state"]
    for i, parameter in enumerate(model.parameters()):
        wanted = plain.state[parameter]["momentum_buffer"] / 6
        assert torch.allclose(state[i]["momentum_buffer"], wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("updates", RULES)
def test_samples_without_a_target_or_a_finite_loss_are_predicted_and_change_nothing_else(updates: str) -> None:
    without = {0, 1, 4, 9}
    samples = stream(N, without)
    samples[6] = samples[6][0], torch.full((4,), -100)  # a mean over no target: NaN
    with learning(network(), 3, updates, on_nonfinite="skip", accumulate=4) as pipe:
        found = list(pipe.learn(iter(samples)))  # the shape of targets is not known before the third
        assert [r.seq for r in found if r.loss is None] == sorted(without)
        assert [r.seq for r in found if r.skipped] == [6]
        assert math.isnan(found[6].loss or 0.0)
        assert pipe.snapshot()["updates"] == 3
    with learning(network(), 3, updates) as pipe:
        before = {name: p.clone() for name, p in pipe.named_parameters()}
        assert [r.loss for r in pipe.learn(stream(5, range(5)))] == [None] * 5
        assert same(dict(pipe.named_parameters()), before)


def test_a_loss_that_is_not_finite_stops_with_its_sample_named() -> None:
    samples = stream(N)
    samples[5] = samples[5][0], torch.full((4,), -100)
    with learning(network(), 3) as pipe:
        found: list[int] = []
        with pytest.raises(StepError, match=r"stage 2 on device 2 raised FloatingPointError at sample 5: .* is nan"):
            found += [r.seq for r in pipe.learn(samples)]
        with pytest.raises(PipelineClosed, match="it failed: stage 2"):
            pipe.learn(samples)


def test_a_stream_may_end_early_fail_or_be_empty_and_another_follow() -> None:
    def broken() -> Iterator[Sample]:
        yield from stream(3)
        raise OSError("camera")

    with learning(network(), 3) as pipe:
        assert list(pipe.learn([])) == []
        found: list[int] = []
        with pytest.raises(OSError, match="camera"):
            found.extend(r.seq for r in pipe.learn(broken()))
        results = pipe.learn(iter(stream(50)))
        found += [next(results).seq, next(results).seq]
        with pytest.raises(InputError, match="one learn\\(\\) at a time"):
            pipe.learn(stream(1))
        results.close()
        taken = pipe.samples
        assert 5 < taken < 50
        assert pipe.snapshot()["updates"] == taken  # what was inside is learned from, once
        with pytest.raises(InputError, match=f"sample {taken}: input 'x' has shape"):
            list(pipe.learn([(torch.randn(5, 6, dtype=torch.float64), stream(1)[0][1])]))
        with pytest.raises(InputError, match=f"sample {taken}: its target is a torch.float32"):
            list(pipe.learn([(stream(1)[0][0], torch.randn(4))]))
        found += [r.seq for r in pipe.learn(stream(2))]
        assert found == [0, 1, 2, 3, 4, taken, taken + 1]


@pytest.mark.parametrize(("updates", "group"), [("weight_stashing", 1), ("2bw", 3), ("sync", 4)])
def test_a_snapshot_is_of_one_version_and_learning_resumes_from_it(updates: str, group: int) -> None:
    samples, snapshots = stream(20), list[dict[str, Any]]()
    with learning(network(), 3, updates, accumulate=group) as pipe:
        seen: list[int] = []
        for result in pipe.learn(samples):
            seen.append(result.seq)
            if result.seq == 6:
                snapshots.append(pipe.snapshot())
        assert seen == list(range(20))
    (snapshot,) = snapshots
    done = snapshot["samples"]
    assert done < 20
    assert done % group == 0
    assert snapshot["updates"] == done // group
    with learning(network(), 3, updates, accumulate=group) as pipe:  # what a stream that ends there leaves
        list(pipe.learn(samples[:done]))
        assert same(pipe.snapshot()["model"], snapshot["model"])
        rest = [r.seq for r in pipe.learn(samples[done:])]
        wanted = pipe.snapshot()
    with learning(network(), 3, updates, accumulate=group) as pipe:
        pipe.load_snapshot(snapshot)
        assert [r.seq for r in pipe.learn(samples[done:])] == rest
        found = pipe.snapshot()
    assert same(found["model"], wanted["model"])
    assert (found["samples"], found["updates"]) == (wanted["samples"], wanted["updates"])


def test_rates_scale_with_the_delay_and_can_be_set() -> None:
    with learning(network(), 3, scale_lr=True) as pipe:
        list(pipe.learn(stream(1)))
        devices = pipe._learner._devices  # type: ignore[union-attr]
        assert [d.updates.optimizers[i].param_groups[0]["lr"] for i, d in enumerate(devices)] == [0.1 / 3, 0.1 / 2, 0.1]
        assert pipe.snapshot()["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1)
        pipe.set_optimizer(lr=0.6)
        assert [d.updates.optimizers[i].param_groups[0]["lr"] for i, d in enumerate(devices)] == [0.6 / 3, 0.3, 0.6]


@pytest.mark.parametrize("updates", ["weight_stashing", "sideways"])
def test_frozen_stages_are_not_gone_back_through(updates: str) -> None:
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("c.", "last.")))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with learning(model, 3, updates) as pipe:
        assert [r.seq for r in pipe.learn(stream(N))] == list(range(N))
        assert pipe.snapshot()["updates"] == N
        assert not any(edge.backward and edge.target == 0 for edge in pipe.program.edges)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["c.weight", "c.bias", "last.weight", "last.bias"]


def test_generated_modules_show_the_schedule() -> None:
    with learning(network(), 3) as pipe:
        first, _, last = (module.source for module in pipe.learn_package.package.modules)
    for words in ("# warm-up: 2 forwards", "# steady state: a forward, the backward of 2 samples before", "# drain"):
        assert words in first
    assert "warm-up" not in last
    assert "weights.update()  # 2STEP" in last
    with learning(network(), 2, "sideways") as pipe:
        assert "retain_graph=True" in pipe.learn_package.package.modules[0].source
        assert "retain_graph=True" not in pipe.learn_package.package.modules[1].source


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(PlanError, match="one update of 3 samples or more on 3 stages"):
        learning(network(), 3, "2bw", accumulate=2)
    with pytest.raises(PlanError, match="an update takes one sample at least"):
        learning(network(), 2, accumulate=0)
    with pytest.raises(InputError, match="updates='never': choose one of 'sync', 'weight_stashing'"):
        learning(network(), 2, "never")
    with pytest.raises(InputError, match=r"accumulate=1\.5: it counts samples"):
        learning(network(), 2, accumulate=1.5)
    with pytest.raises(InputError, match=r"optimizer= is a SGD already; every stage has its own: .*partial"):
        learning(network(), 2, optimizer=SGD(list(network().parameters())))
    with pytest.raises(InputError, match=r"optimizer= cannot update a weight \(TypeError: .*closure"):
        learning(network(), 2, optimizer=torch.optim.LBFGS)

    with learning(network(), 2) as pipe, pytest.raises(InputError, match="sample 0 is no pair"):
        list(pipe.learn([torch.ones(1)]))
    assert pipecompile.LearningPipeline is type(pipe)


class Tied(nn.Module):
    """A weight that the first two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 3)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied().double()


@pytest.mark.parametrize("updates", ["weight_stashing", "sideways"])
def test_layers_that_share_a_weight_share_a_stage(updates: str) -> None:
    plain = partial(torch.optim.SGD, lr=0.0, momentum=1.0)
    model, samples = tied(), stream(N)
    optimizer = plain(list(model.parameters()))
    for x, y in samples:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with learning(tied(), 3, updates, optimizer=plain) as pipe:
        names = [[pipe.plan.layer_names[i] for i in stage.layers] for stage in pipe.plan.stages]
        assert {"a", "b"} <= set(names[0])
        assert "d" in names[2]
        assert len(list(pipe.learn(samples))) == N
        state = pipe.snapshot()["optimizer"]["state"]
    if updates == "weight_stashing":  # at rate 0 nothing is late
        for i, parameter in enumerate(model.parameters()):
            wanted = optimizer.state[parameter]["momentum_buffer"]
            assert torch.allclose(state[i]["momentum_buffer"], wanted, rtol=1e-12, atol=1e-15)


def test_a_weight_shared_by_the_first_and_the_last_layer_leaves_one_stage_and_says_why() -> None:
    model = tied()
    assert isinstance(model, Tied)
    model.c.weight = model.a.weight
    model.d = nn.Linear(6, 6).double()
    model.d.weight = model.a.weight
    with pytest.warns(PipecompileWarning, match=r"'a', 'b', 'c', 'd' share the weight '.\.weight'"):
        pipe = pipecompile.compile(
            model, (stream(1)[0][0],), mode="learn", devices=2, loss_fn=nn.functional.cross_entropy, optimizer=SGD,
            executor="inline", profile_seconds=0.02,
        )  # fmt: skip
    with pipe:
        assert len(pipe.plan.stages) == 1
        assert [r.seq for r in pipe.learn(stream(3))] == [0, 1, 2]


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "latest"])
def test_dropped_samples_never_shift_the_targets_of_others(policy: Any) -> None:
    """The source is done before the first sample enters; each target says which sample it belongs to."""
    read = threading.Event()

    def source() -> Iterator[Sample]:
        x, y = torch.empty(4, 6, dtype=torch.float64), torch.empty(4, dtype=torch.int64)
        for i, (inputs, targets) in enumerate(stream(40)):
            x.copy_(inputs)
            x[0, 0] = i
            yield x, y.copy_(torch.tensor([i % 3, *targets[1:].tolist()]))  # the same memory every time
        read.set()

    class Watching(nn.Module):
        def forward(self, result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert read.wait(10)
            seen.append(int(target[0]))
            return nn.functional.cross_entropy(result, target)

    seen: list[int] = []
    with learning(network(), 2, loss_fn=Watching()) as pipe:
        found = [r.seq for r in pipe.learn(source(), on_overload=policy, max_waiting=None if policy == "latest" else 3)]
        assert found == sorted(set(found))
        assert seen == [seq % 3 for seq in found]
        counts = pipe.counts
        assert (counts.submitted, counts.delivered, counts.dropped, counts.in_flight) == (
            40,
            len(found),
            40 - len(found),
            0,
        )
        assert counts.dropped > 0
        assert pipe.snapshot()["updates"] == len(found)
        if policy != "drop_newest":
            assert found[-1] == 39
        assert [r.seq for r in pipe.learn(stream(2))] == [40, 41]
        with pytest.raises(Overloaded, match="was refused: 1 samples wait already"):
            list(pipe.learn(source(), on_overload="error", max_waiting=1))
