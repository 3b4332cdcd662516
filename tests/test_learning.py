"""The promise of online learning: weights, outputs, losses and delays of the sequential oracle, bit for bit."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from models.learning import LESSONS, Lesson, Steps, as_planned, chain
from oracles.learning import Run, Sample, delays, learn
from pipecompile.errors import InputError, PipecompileWarning, PipelineClosed, PlanError, StepError
from pipecompile.ir.cluster import Link
from pipecompile.ir.profile import Profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.pipelines import learn_driver, step_planner
from pipecompile.pipelines.learning import LearningPipeline
from pipecompile.runtime.versions import StageWeights

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)  # any more, and some rules diverge within 1,000 updates
ADAM = partial(torch.optim.Adam, lr=0.003)
OPTIMIZERS = {"sgd": SGD, "adam": ADAM}
RULES: list[Any] = ["sync", "weight_stashing", "2bw", "stale", "sideways"]
CLOCKS = ["1f1b", "lockstep"]
MSE = nn.functional.mse_loss

Way = tuple[Lesson, str, str, int, str]


@pytest.fixture(autouse=True)
def every_layer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cut every time, one that has skips between stages that are no neighbours."""

    def apply(self: ProfileLayers, graph: Any, *_: Any) -> Profile:
        sizes = dict.fromkeys(graph.values, 1) | dict.fromkeys(graph.inputs, 1)
        return Profile((1.0,) * len(graph.layers), sizes, Link(1e-6, 1e12), float(len(graph.layers)))

    monkeypatch.setattr(ProfileLayers, "apply", apply)
    monkeypatch.setattr(step_planner, "_TOLERANCE", math.inf)
    monkeypatch.setattr(learn_driver, "update_seconds", lambda *_, **__: 0.0)


def compiled(lesson: Lesson, rule: Any, clock: Any, stages: int, optimizer: Any = SGD, **more: Any) -> LearningPipeline:
    """The lesson's model, each step a layer."""
    model = lesson.model()
    (x,), y = lesson.samples(1)[0]
    options = {"executor": "inline", "profile_seconds": 0.02, "on_nonfinite": "skip", "example_targets": y, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)  # four devices share two cores
        pipe = pipecompile.compile(
            model, (x,), mode="learn", loss_fn=MSE, optimizer=optimizer, updates=rule, clock=clock, devices=stages,
            leaf=list(model.reads), **options,
        )  # fmt: skip
    assert isinstance(pipe, LearningPipeline)
    assert len(pipe.plan.stages) == stages
    return pipe


def least(rule: str, clock: str, stages: int) -> int:
    """Samples an update: as few as the rule allows."""
    return 1 if rule != "2bw" or stages == 1 else stages if clock == "1f1b" else 2 * (stages - 1)


def with_gaps(samples: Sequence[Sample]) -> list[Sample]:
    """Some without a target (the first and the last too), one whose loss is infinite, two whose input is NaN."""
    last = len(samples) - 1
    gaps = [(x, None if k in (0, 4, 5, last) or k % 11 == 8 else y) for k, (x, y) in enumerate(samples)]
    gaps[12] = gaps[12][0], gaps[12][1] * math.inf
    for k in (23, 25):
        gaps[k] = (gaps[k][0][0] * math.nan,), gaps[k][1]
    return gaps


def agree(
    pipe: LearningPipeline, lesson: Lesson, samples: Sequence[Sample], optimizer: Any, rule: Any, clock: str,
    accumulate: int, **more: Any,
) -> Run:  # fmt: skip
    """Run both; everything that comes out must be equal, and every stage must have learned."""
    model = lesson.model()
    stages = as_planned(model, pipe.plan)
    wanted = learn(
        model, model.parts(stages), samples, MSE, optimizer, rule, clock=clock, accumulate=accumulate, **more
    )
    start = lesson.model().state_dict()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PipecompileWarning)
        results = list(pipe.learn(samples))
    assert pipe.left_out == wanted.left_out
    assert bool(said) == bool(wanted.left_out)
    assert [result.seq for result in results] == list(range(len(samples)))
    finite = [output for output, (x, _) in zip(wanted.outputs, samples, strict=True) if bool(x[0].isfinite().all())]
    assert all(output.isfinite().all() for output in finite), "it diverges: equal NaNs would prove nothing"
    for result, output, loss, versions in zip(results, wanted.outputs, wanted.losses, wanted.versions, strict=True):
        assert torch.allclose(result.output, output, rtol=0.0, atol=0.0, equal_nan=True), f"output {result.seq}"
        assert repr(result.loss) == repr(loss), f"loss {result.seq}"
        assert result.versions == versions, f"versions {result.seq}"
        assert result.skipped == (loss is not None and not math.isfinite(loss))
    mine = pipe.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(mine[name], value), name
    for stage in stages:
        weights = [name for name, _ in model.named_parameters() if name.partition(".")[0] in stage]
        assert not weights or any(not torch.equal(mine[name], start[name]) for name in weights), f"{stage} stood still"
    return wanted


def check(way: Way, count: int, *, gaps: bool = False, accumulate: int | None = None, **more: Any) -> None:
    lesson, rule, clock, stages, name = way
    m = accumulate or least(rule, clock, stages)
    samples = with_gaps(lesson.samples(count)) if gaps else lesson.samples(count)
    with compiled(lesson, rule, clock, stages, OPTIMIZERS[name], accumulate=m, **more) as pipe:
        agree(pipe, lesson, samples, OPTIMIZERS[name], rule, clock, m)


EVERYTHING = [
    (lesson, rule, clock, stages, name)
    for lesson, rule, clock, stages, name in product(LESSONS.values(), RULES, CLOCKS, (1, 2, 3, 4), OPTIMIZERS)
]


def pairwise() -> list[Way]:
    """Each rule with each number of stages; models, clocks and optimizers in turns."""
    lessons, names = list(LESSONS.values()), list(OPTIMIZERS)
    return [
        (lessons[(i + j) % 3], rule, CLOCKS[(i + j // 2) % 2], stages, names[j % 2])
        for i, rule in enumerate(RULES)
        for j, stages in enumerate((4, 3, 2, 1))
        if stages > 1 or i % 2 == 0
    ]


QUICK = pairwise()


@pytest.mark.parametrize("way", QUICK, ids=lambda way: "-".join(map(str, way)))
def test_learning_equals_the_oracle(way: Way) -> None:
    check(way, 60, gaps=QUICK.index(way) % 2 == 0)


@pytest.mark.parametrize("way", QUICK[1::4], ids=lambda way: "-".join(map(str, way)))
def test_learning_with_an_update_every_four_samples(way: Way) -> None:
    """62 is no multiple: the last update has two samples, of which one has a target."""
    lesson, rule, clock, stages, name = way
    check((lesson, rule, clock, min(stages, 3), name), 62, gaps=True, accumulate=4)


IN_WORKERS = [
    (LESSONS["skip"], "weight_stashing", "1f1b", 3, "sgd"),
    (LESSONS["norms"], "sideways", "lockstep", 2, "adam"),
    (LESSONS["plain"], "2bw", "1f1b", 2, "sgd"),
]


@pytest.mark.parametrize("way", IN_WORKERS, ids=lambda way: "-".join(map(str, way)))
def test_workers_learn_what_the_oracle_learns(way: Way) -> None:
    check(way, 60, gaps=True, executor="process")


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERYTHING, ids=lambda way: "-".join(map(str, way)))
def test_a_thousand_updates_equal_the_oracle(way: Way) -> None:
    _, rule, clock, stages, _ = way
    check(way, 1000 * least(rule, clock, stages))


@pytest.mark.slow
@pytest.mark.parametrize("way", EVERYTHING[3::7], ids=lambda way: "-".join(map(str, way)))
def test_workers_learn_what_the_oracle_learns_for_long(way: Way) -> None:
    check(way, 1000, gaps=True, executor="process")


@pytest.mark.parametrize("rule", RULES)
def test_streams_of_any_length(rule: Any) -> None:
    """Shorter than the warm-up, empty, one after the other: each goes on with the weights of the one before."""
    plain = partial(torch.optim.SGD, lr=0.05)
    lesson, m = LESSONS["skip"], least(rule, "lockstep", 3)
    model, samples = lesson.model(), lesson.samples(40)
    with compiled(lesson, rule, "lockstep", 3, plain, accumulate=m) as pipe:
        stages, at = as_planned(model, pipe.plan), 0
        for count in (0, 1, 2, 3, 5, 0, 9, 17):
            piece = samples[at : at + count]
            wanted = learn(model, model.parts(stages), piece, MSE, plain, rule, clock="lockstep", accumulate=m)
            results = list(pipe.learn(iter(piece)))
            assert [result.seq for result in results] == list(range(at, at + count))
            assert all(map(torch.equal, [result.output for result in results], wanted.outputs))
            at += count
        mine = pipe.state_dict()
        assert all(torch.equal(mine[name], value) for name, value in model.state_dict().items())


def test_delays_are_those_documented() -> None:
    """What forwards really read, against the numbers in docs/learning.md, written out."""
    lesson = LESSONS["plain"]
    documented = {
        ("sync", "1f1b"): (0, 0, 0, 0),
        ("weight_stashing", "1f1b"): (3, 2, 1, 0),
        ("weight_stashing", "lockstep"): (6, 4, 2, 0),
        ("stale", "1f1b"): (3, 2, 1, 0),
        ("sideways", "lockstep"): (6, 4, 2, 0),
    }
    for (rule, clock), late in documented.items():
        with compiled(lesson, rule, clock, 4, accumulate=1) as pipe:
            for result in pipe.learn(lesson.samples(20)):
                assert result.versions == tuple(max(0, result.seq - delay) for delay in late), (rule, clock)
            assert tuple(pipe.rule.delay(stage, 4) for stage in range(4)) == late
    with compiled(lesson, "2bw", "1f1b", 4, accumulate=4) as pipe:
        for result in pipe.learn(lesson.samples(20)):
            assert result.versions == (max(0, result.seq // 4 - 1),) * 4
        assert [pipe.rule.delay(stage, 4) for stage in range(4)] == [1] * 4


class _Saved:
    """What autograd keeps of a forward, for as long as it does."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def most_saved(rule: str, clock: str, stages: int) -> int:
    """The most tensors that autograd keeps at once in a steady stream."""
    gc.collect()  # those of pipelines before
    lesson, peak = Lesson("even", even, (1, 12)), 0
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(value: torch.Tensor) -> _Saved:
        nonlocal peak
        saved = _Saved(value.detach())  # a result that is saved must not hold its own graph
        alive.add(saved)
        peak = max(peak, len(alive))
        return saved

    with compiled(lesson, rule, clock, stages, accumulate=least(rule, clock, stages)) as pipe:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
            assert len(list(pipe.learn(lesson.samples(30)))) == 30
        held = [weights for weights in gc.get_objects() if type(weights) is StageWeights]
        sets = {weights._stage: len(weights.sets) for weights in held}
        ahead = [0] * stages if rule == "sync" else delays(stages, clock)
        most = {"weight_stashing": [1 + w for w in ahead], "2bw": [2] * stages}.get(rule, [1] * stages)
        assert [sets[stage] for stage in range(stages)] == most, (rule, clock, sets)
        assert [pipe.rule.sets(stage, stages) for stage in range(stages)] == most
        for weights in held:
            memory = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for some in weights.sets for t in some
            }
            assert sum(memory.values()) == most[weights._stage] * sum(t.nbytes for t in weights.sets[0])
    return peak


def even() -> Steps:
    """Stages alike, whatever their number."""
    modules: dict[str, nn.Module] = {}
    for i in range(8):
        modules |= {f"linear{i}": nn.Linear(12, 3 if i == 7 else 12), f"tanh{i}": nn.Tanh()}
    return chain(modules)


def test_memory_is_that_documented() -> None:
    """Activations of one sample a stage for `sideways`, of w + 1 for `weight_stashing`; copies of weights likewise."""
    one = most_saved("sync", "1f1b", 1)
    assert one >= 16
    for clock, stages in (("1f1b", 4), ("lockstep", 2), ("lockstep", 4)):
        # while a stage computes the next sample, it may still have the one before
        assert one <= most_saved("sideways", clock, stages) <= one * (1 + 1 / stages)
    kept = one * sum(w + 1 for w in delays(4, "lockstep")) / 4
    for rule in ("weight_stashing", "stale", "2bw"):
        assert 0.7 * kept <= most_saved(rule, "lockstep", 4) <= kept  # not all stages peak at once


@pytest.mark.parametrize("rule", RULES)
def test_without_targets_nothing_moves(rule: Any) -> None:
    lesson = LESSONS["skip"]
    samples = [(x, None) for x, _ in lesson.samples(12)]
    start = lesson.model()
    with compiled(lesson, rule, "1f1b", 3, accumulate=least(rule, "1f1b", 3)) as pipe:
        results = list(pipe.learn(samples))
        assert [result.loss for result in results] == [None] * 12
        assert {result.versions for result in results} == {(0, 0, 0)}
        assert all(torch.equal(result.output, start(*x)) for result, (x, _) in zip(results, samples, strict=True))
        assert all(map(torch.equal, pipe.parameters(), start.parameters()))


def test_a_loss_that_is_not_finite_stops() -> None:
    lesson = LESSONS["plain"]
    samples = lesson.samples(10)
    samples[6] = samples[6][0], samples[6][1] * math.nan
    pipe = compiled(lesson, "weight_stashing", "1f1b", 3, on_nonfinite="stop")
    got: list[int] = []
    with pytest.raises(StepError, match="loss of sample 6 is nan"):
        got += [result.seq for result in pipe.learn(samples)]
    assert got == list(range(len(got)))
    with pytest.raises(PipelineClosed):
        next(iter(pipe.learn(samples)))
    pipe.close()


def test_learning_rates_scaled_by_delay() -> None:
    lesson = LESSONS["skip"]
    for rule, m in (("weight_stashing", 1), ("2bw", 3)):
        with compiled(lesson, rule, "1f1b", 3, ADAM, accumulate=m, scale_lr=True) as pipe:
            agree(pipe, lesson, lesson.samples(40), ADAM, rule, "1f1b", m, scaled=True)


def test_frozen_layers_stay_and_the_rest_learns() -> None:
    """Frozen in front: no backward goes that far."""
    lesson = LESSONS["plain"]
    samples = lesson.samples(30)

    class Frozen(Lesson):
        def model(self, dtype: torch.dtype = torch.float32) -> Any:
            model = lesson.model(dtype)
            model.get_submodule("linear0").requires_grad_(False)
            return model

    frozen = Frozen(lesson.name, lesson.build, lesson.shape)
    for rule in ("weight_stashing", "sideways"):
        with compiled(frozen, rule, "1f1b", 3) as pipe:
            other = frozen.model()
            learn(other, other.parts(as_planned(other, pipe.plan)), samples, MSE, SGD, rule)
            assert len(list(pipe.learn(samples))) == 30
            mine = pipe.state_dict()
            assert all(torch.equal(mine[name], value) for name, value in other.state_dict().items())
            assert torch.equal(mine["linear0.weight"], lesson.model().state_dict()["linear0.weight"])


def test_an_iteration_that_is_left_early_loses_nothing() -> None:
    """What was taken in is learned from; the next stream goes on behind it."""
    plain = partial(torch.optim.SGD, lr=0.05)
    lesson = LESSONS["plain"]
    model, samples = lesson.model(), lesson.samples(40)
    taken: list[Sample] = []

    def source() -> Any:
        for sample in samples:
            taken.append(sample)
            yield sample

    with compiled(lesson, "stale", "1f1b", 3, plain) as pipe:
        stream = pipe.learn(source())
        for _ in range(7):
            next(stream)
        for use in (lambda: pipe.load_state_dict(model.state_dict()), lambda: pipe(samples[0][0])):
            with pytest.raises(InputError, match="a stream is under way"):
                use()
        stream.close()
        stages = as_planned(model, pipe.plan)
        assert 7 <= pipe.samples <= len(taken) < 40
        learn(model, model.parts(stages), taken[: pipe.samples], MSE, plain, "stale")
        mine = pipe.state_dict()
        assert all(torch.equal(mine[name], value) for name, value in model.state_dict().items())
        before = pipe.samples
        assert next(pipe.learn(samples)).seq == before


def test_bad_input_is_named() -> None:
    lesson = LESSONS["plain"]
    samples = lesson.samples(6)
    with pytest.raises(InputError, match="updates='newest': choose one of 'sync', 'weight_stashing'"):
        compiled(lesson, "newest", "1f1b", 2)
    with pytest.raises(InputError, match="clock='fast'"):
        compiled(lesson, "stale", "fast", 2)
    with pytest.raises(PlanError, match=r"accumulate=2: .* 3 samples or more on 3 stages"):
        compiled(lesson, "2bw", "1f1b", 3, accumulate=2)
    for bad, said in (
        (samples[0][0], r"sample 3 is no pair \(input, target\)"),
        ((samples[0][0], torch.zeros(2)), r"sample 3: its target .* shape \(2,\)"),
        ((torch.zeros(1, 5), samples[0][1]), "sample 3: "),
    ):
        with compiled(lesson, "weight_stashing", "1f1b", 2) as pipe:
            got = []
            with pytest.raises(InputError, match=said):
                got += [result.seq for result in pipe.learn([*samples[:3], bad, *samples[3:]])]
            assert [result.seq for result in pipe.learn(samples)] == list(range(3, 9))  # and it goes on
