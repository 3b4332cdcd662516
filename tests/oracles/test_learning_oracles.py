"""The oracles of online learning against each other and against theory."""

from __future__ import annotations

import copy
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.learning import LESSONS, Lesson, Steps, evenly
from oracles.learning import Buffers, Run, Sample, Updates, at_composites, by_stages, delays, learn

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
MSE = nn.functional.mse_loss
RULES: list[Any] = ["sync", "weight_stashing", "2bw", "stale", "sideways"]
CLOCKS = ["1f1b", "lockstep"]


def run(
    lesson: Lesson, stages: int, rule: Any, samples: list[Sample], optimizer: Any = SGD, **more: Any
) -> tuple[Run, Steps]:
    model = lesson.model()
    return learn(model, model.parts(evenly(model, stages)), samples, MSE, optimizer, rule, **more), model


def same(one: tuple[Run, nn.Module], other: tuple[Run, nn.Module]) -> bool:
    mine, yours = one[1].state_dict(), other[1].state_dict()
    return all(map(torch.equal, one[0].outputs, other[0].outputs)) and all(torch.equal(mine[n], yours[n]) for n in mine)


@pytest.mark.parametrize("lesson", LESSONS.values(), ids=str)
def test_one_stage_is_plain_online_learning(lesson: Lesson) -> None:
    samples = lesson.samples(40)
    model = lesson.model()
    optimizer, outputs = SGD(model.parameters()), list[Tensor]()
    for inputs, target in samples:
        optimizer.zero_grad()
        outputs.append(model(*inputs))
        MSE(outputs[-1], target).backward()
        optimizer.step()
    plain = Run([value.detach() for value in outputs]), model
    for rule, clock in product(RULES, CLOCKS):
        assert same(run(lesson, 1, rule, samples, clock=clock), plain), (rule, clock)
    assert same(run(lesson, 3, "sync", samples), plain)


#: Stages, clock, samples an update, whether weights are swapped.
WAYS = [(2, "1f1b", 1, True), *product((3,), CLOCKS, (1,), (False, True)), (4, "lockstep", 4, False)]


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("lesson", LESSONS.values(), ids=str)
def test_whole_model_autograd_equals_stage_after_stage(lesson: Lesson, optimizer: Any) -> None:
    """True gradients at composites of delayed versions, and swapped weights, are what stages compute."""
    samples = lesson.samples(24)
    samples[7] = samples[7][0], None
    samples[9] = samples[9][0], samples[9][1] * torch.inf
    samples[11] = samples[11][0], samples[11][1] * torch.inf
    samples[-1] = samples[-1][0], None
    for stages, clock, n, swap in WAYS:
        ways: list[tuple[Run, nn.Module]] = []
        for whole in (True, False):
            model = lesson.model()
            parts, late = model.parts(evenly(model, stages)), delays(stages, clock)
            updates = Updates(model, parts, optimizer, n, len(samples), [0] * stages)
            if whole:
                ways.append((at_composites(model, samples, MSE, updates, late, Buffers(parts, late), swap), model))
            else:
                rule = "stale" if swap else "weight_stashing"
                ways.append((by_stages(parts, samples, MSE, updates, late, rule), model))
        assert same(*ways), (stages, clock, swap)
        assert ways[0][0].versions == ways[1][0].versions
        assert ways[0][0].losses == ways[1][0].losses


def test_delays_are_those_documented() -> None:
    assert delays(4, "1f1b") == [3, 2, 1, 0]
    assert delays(4, "lockstep") == [6, 4, 2, 0]
    lesson = LESSONS["plain"]
    samples = lesson.samples(30)
    for rule in RULES:
        for clock, m in product(CLOCKS, (1, 6)):
            found, _ = run(lesson, 4, rule, samples, clock=clock, accumulate=m)
            late = delays(4, clock)
            for k, read in enumerate(found.versions):
                if rule == "sync":
                    assert read == (k // m,) * 4
                elif rule == "2bw":
                    assert read == (max(0, k // m - 1),) * 4
                else:
                    assert read == tuple(max(0, k - d) // m for d in late)


def test_rules_differ() -> None:
    """An oracle that could not tell the rules apart would judge nothing."""
    lesson = LESSONS["skip"]
    samples = lesson.samples(20)
    runs = [run(lesson, 3, rule, samples, clock=clock) for rule in RULES[1:] for clock in CLOCKS if rule != "2bw"]
    runs += [run(lesson, 3, "2bw", samples, accumulate=4), run(lesson, 3, "sync", samples)]
    for i, one in enumerate(runs):
        assert not any(same(one, other) for other in runs[:i])


def test_two_versions_lag_by_one_update() -> None:
    """Written out: W(g+1) = W(g) - lr * mean gradient at W(g-1)."""
    lesson = LESSONS["skip"]
    samples, m, lr = lesson.samples(24), 4, 0.1
    _, model = run(lesson, 3, "2bw", samples, partial(torch.optim.SGD, lr=lr), accumulate=m)
    by_hand = lesson.model()
    older = copy.deepcopy(by_hand)
    for g in range(0, len(samples), m):
        older.zero_grad()
        for inputs, target in samples[g : g + m]:
            (MSE(older(*inputs), target) / m).backward()
        gradients = [p.grad for p in older.parameters()]
        older.load_state_dict(by_hand.state_dict())
        with torch.no_grad():
            for p, gradient in zip(by_hand.parameters(), gradients, strict=True):
                assert gradient is not None
                p -= lr * gradient
    for mine, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("lesson", LESSONS.values(), ids=str)
def test_sideways_on_a_constant_stream_gives_true_gradients(lesson: Lesson, clock: str) -> None:
    """Old errors at new activations are true gradients if nothing changes, and are not where the input moves."""
    samples = [lesson.samples(1)[0]] * 12
    model = lesson.model()
    still = partial(torch.optim.SGD, lr=0.0)
    found = learn(model, model.parts(evenly(model, 4)), samples, MSE, still, "sideways", clock=clock)
    inputs, target = samples[0]
    true = torch.autograd.grad(MSE(model(*inputs), target), list(model.parameters()))
    wanted = dict(zip(dict(model.named_parameters()), true, strict=True))
    for gradients in found.gradients:
        assert sorted(gradients) == [0, 1, 2, 3]
        for stage in gradients.values():
            for name, gradient in stage.items():
                assert gradient is not None
                torch.testing.assert_close(gradient, wanted[name])
    moving, _ = run(lesson, 4, "sideways", lesson.samples(12), still, clock=clock)
    exact, _ = run(lesson, 4, "weight_stashing", lesson.samples(12), still, clock=clock)
    first, last = moving.gradients[3], exact.gradients[3]
    assert all(torch.equal(first[3][name], last[3][name]) for name in first[3])
    assert not all(torch.equal(first[0][name], last[0][name]) for name in first[0])


def test_sideways_in_lockstep_is_partimes_clock() -> None:
    """PARTIME's equations tick by tick: x_i(t) = y_{i-1}(t-1), g_i(t) = e_{i+1}(t-1), update at once."""
    lesson, stages, lr = LESSONS["plain"], 4, 0.05
    samples = lesson.samples(30)
    model = lesson.model()
    parts = model.parts(evenly(model, stages))
    named = dict(model.named_parameters())
    sent: list[Any] = [None] * (stages + 1)  # forward, as it leaves each stage
    errors: list[Any] = [None] * (stages + 1)
    for t, (inputs, _) in enumerate(samples):
        arrived, came = [inputs[0], *sent[1:-1]], list(errors)
        for i, part in enumerate(parts):
            if arrived[i] is None:
                continue
            x = arrived[i].detach().requires_grad_()
            (y,) = part.call({name: named[name] for name in part.weights}, {part.reads[0]: x}).values()
            sent[i + 1] = y
            if i == stages - 1:
                y, came[i + 1] = MSE(y, samples[t - i][1]), torch.ones(())
            if came[i + 1] is not None:
                e, *gradients = torch.autograd.grad(y, [x, *(named[name] for name in part.weights)], came[i + 1])
                errors[i] = e
                with torch.no_grad():
                    for name, gradient in zip(part.weights, gradients, strict=True):
                        named[name].add_(gradient, alpha=-lr)
    # After the last tick stage i has done the backwards of samples 0 .. T-1-2(S-1)+i; the pipeline goes on until
    # all are done. What is compared is a pipeline whose later samples have no targets.
    for i, part in enumerate(parts):
        done = len(samples) - 2 * (stages - 1) + i
        stopped = lesson.model()
        cut = [(x, target if k < done else None) for k, (x, target) in enumerate(samples)]
        plain = partial(torch.optim.SGD, lr=lr)
        learn(stopped, stopped.parts(evenly(stopped, stages)), cut, MSE, plain, "sideways", clock="lockstep")
        for name in part.weights:
            assert torch.equal(dict(stopped.named_parameters())[name], named[name]), (i, name)


def test_a_sample_without_a_loss_changes_no_weight_and_shifts_no_target() -> None:
    """Versions stand still for it, and everything else learns as if it had not been there, one stage at a time."""
    lesson = LESSONS["plain"]
    samples = lesson.samples(20)
    gaps = [(x, None if k in (0, 5, 6, 19) else target) for k, (x, target) in enumerate(samples)]
    for rule in RULES:
        found, _ = run(lesson, 3, rule, gaps)
        assert [loss is None for loss in found.losses] == [k in (0, 5, 6, 19) for k in range(20)]
        assert [bool(g) for g in found.gradients] == [loss is not None for loss in found.losses]
    _, model = run(lesson, 3, "sync", gaps)
    _, other = run(lesson, 3, "sync", [s for s in gaps if s[1] is not None])
    assert same((Run(), model), (Run(), other))
    broken = [(x, target * float("inf") if k == 4 else target) for k, (x, target) in enumerate(samples)]
    for rule in RULES:
        found, model = run(lesson, 3, rule, broken)
        assert found.losses[4] == float("inf")
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_scaled_learning_rates() -> None:
    lesson = LESSONS["plain"]
    samples = lesson.samples(1)
    one, plain = run(lesson, 4, "weight_stashing", samples)
    two, scaled = run(lesson, 4, "weight_stashing", samples, scaled=True)
    start = dict(lesson.model().named_parameters())
    for i, stage in enumerate(evenly(plain, 4)):
        for name, p in plain.named_parameters():
            if name.partition(".")[0] in stage:
                moved = dict(scaled.named_parameters())[name] - start[name]
                torch.testing.assert_close(moved * (4 - i), p - start[name], rtol=1e-3, atol=1e-6)
    assert one.losses == two.losses
