"""``micro_batches="auto"``: which numbers are tried, and that the simulator's best within the limit is taken."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.clusters import make_cluster
from pipecompile.errors import PipecompileWarning, PlanError, TraceError, WorkerDied
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.plan import Plan
from pipecompile.ir.training import StageCost
from pipecompile.ir.tree import flatten
from pipecompile.passes import part_counts as part_counts_module
from pipecompile.passes.choose_step import Candidate, ChooseStep
from pipecompile.passes.lower_step import LowerStep
from pipecompile.passes.part_counts import best_way, part_counts
from pipecompile.passes.recompute import Recompute
from pipecompile.pipelines import step_search
from pipecompile.pipelines.step_search import StepSearch, Way, every_way
from pipecompile.pipelines.train_driver import compile_training
from pipecompile.runtime.training import Training
from pipecompile.schedules.training import STEP_SCHEDULES
from test_choose_step import candidate


@pytest.mark.parametrize(
    ("batch", "devices", "wanted"),
    [
        (32, 2, [2, 4, 8, 16]),
        (64, 4, [4, 8, 16, 32]),
        (30, 2, [2, 5, 10, 15]),
        (12, 2, [2, 4, 6]),
        (37, 2, [2, 4, 8, 16]),  # prime: parts that differ by a sample
        (8, 4, [4]),
        (3, 2, [1]),
        (1, 2, [1]),
    ],
)
def test_the_numbers_that_are_tried(batch: int, devices: int, wanted: list[int]) -> None:
    found = part_counts(batch, devices)
    assert found == wanted
    assert all(count == 1 or batch // count >= 2 for count in found)


def split(count: int, fixed: float, each: float) -> list[Candidate]:
    """A batch of 16 in so many parts: ``fixed`` seconds a message of a stage, ``each`` a sample."""
    one = fixed + each * 16 / count
    cost = StageCost(one, one, one, 2 * one, 0.0, 1600 // count)
    return [candidate(name, count, cost) for name in STEP_SCHEDULES]


def no_bound(_: int) -> float:
    return 0.0


@pytest.mark.parametrize(("fixed", "wanted"), [(0.0, 16), (0.5, 2)])
def test_many_small_parts_or_few_large_ones(fixed: float, wanted: int) -> None:
    counts = [2, 4, 8, 16]
    _, chosen, (note,) = best_way(list(map(str, counts)), no_bound, lambda i: split(counts[i], fixed, 0.1), ChooseStep())
    every = [c for count in counts for c in split(count, fixed, 0.1)]
    assert chosen.seconds == min(c.seconds for c in every)
    assert chosen.program.micro_batches == wanted
    assert all(f"{count}: " in note for count in counts)


def test_the_limit_counts_over_all_numbers_and_what_fails_is_told() -> None:
    counts = [2, 4, 8]

    def tried(i: int) -> list[Candidate]:
        if counts[i] == 8:
            raise TraceError("sizes are baked")
        return split(counts[i], 0.5, 0.1)

    _, free, _ = best_way(list(map(str, counts)), no_bound, tried, ChooseStep())
    assert free.program.micro_batches == 2
    limit = min(c.memory for c in split(2, 0.5, 0.1)) - 1
    _, tight, (note,) = best_way(list(map(str, counts)), no_bound, tried, ChooseStep(limit))
    assert tight.program.micro_batches == 4
    assert tight.memory <= limit
    assert f"within {limit:,} bytes" in note
    assert "8: sizes are baked" in note
    with pytest.raises(PlanError, match="no schedule keeps"):
        best_way(list(map(str, counts)), no_bound, tried, ChooseStep(10))

    def never(i: int) -> list[Candidate]:
        raise TraceError(f"no {counts[i]}")

    with pytest.raises(TraceError, match="no 2"):
        best_way(list(map(str, counts)), no_bound, never, ChooseStep())


def test_what_cannot_be_below_the_best_is_not_planned() -> None:
    asked, planned = list[int](), list[int]()
    bounds = {2: 0.0, 4: 1e-3, 8: 1e6, 16: 0.0}
    counts = list(bounds)

    def least(i: int) -> float:
        asked.append(counts[i])
        return bounds[counts[i]]

    def tried(i: int) -> list[Candidate]:
        planned.append(counts[i])
        return split(counts[i], 0.0, 0.1)

    _, chosen, (note,) = best_way(list(map(str, counts)), least, tried, ChooseStep())
    assert asked == [4, 8, 16]  # the first has nothing to be behind of
    assert planned == [2, 4, 16]
    assert chosen.program.micro_batches == 16
    assert "8: not planned, 1e+09 ms if no device ever waited" in note
    best = min(c.seconds for c in split(2, 0.0, 0.1))
    for behind, count in ((1.17, 2), (1.19, 1)):  # what caches may be worth is granted
        planned.clear()
        best_way(["2", "16"], lambda _, by=behind: best * by, lambda i: tried(3 * i), ChooseStep())
        assert len(planned) == count


def raced_two(asked: list[list[int]]) -> Any:
    def raced(close: Sequence[tuple[int, Candidate]]) -> list[float]:
        asked.append([index for index, _ in close])
        return [1.0 + place for place in range(len(close))]

    return raced


def test_what_is_close_by_simulation_is_raced_and_the_fastest_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_counts_module, "_CLOSE", 1.6)
    counts, asked = [2, 4, 8], list[list[int]]()

    def raced(close: Sequence[tuple[int, Candidate]]) -> list[float]:
        asked.append([counts[i] for i, _ in close])
        assert [c.seconds for _, c in close] == sorted(c.seconds for _, c in close)
        return [2.0, 1.0, 3.0]

    def best(fixed: float, limit: int | None = None) -> tuple[int, Candidate, str]:
        def tried(i: int) -> list[Candidate]:
            return split(counts[i], fixed, 0.1)

        index, chosen, (note,) = best_way(list(map(str, counts)), no_bound, tried, ChooseStep(limit), raced=raced)
        return index, chosen, note

    index, chosen, note = best(0.0)
    assert (counts[index], chosen.program.micro_batches) == (asked[0][1], asked[0][1])
    assert f"took {asked[0][1]} ({chosen.name}, 1e+03 ms a step by trial)" in note
    assert f"in workers, taking turns: {asked[0][0]} (" in note
    best(5.0)  # all others are far behind: nothing to race
    assert len(asked) == 1
    for behind, races in ((1.9, 2), (2.1, 1)):  # one that is raced in any case, unless it is twice as slow

        def two(i: int, by: float = behind) -> list[Candidate]:
            return split(2, 0.0, 0.1 * (1.0, by)[i])

        best_way(["2", "one worker"], no_bound, two, ChooseStep(), raced=raced_two(asked), always=[1])
        assert len(asked) == races
        asked[1:] = []

    def broken(_: Any) -> list[float]:
        raise WorkerDied("device 0 ended")

    _, chosen, (note,) = best_way(["2", "4"], no_bound, lambda i: split(counts[i], 0.0, 0.1), ChooseStep(), raced=broken)
    assert "not tried in workers: device 0 ended" in note
    assert "by simulation" in note


@pytest.mark.parametrize("best", ["one worker", "copies", "pipeline"])
def test_where_everything_is_to_be_chosen_it_is_tried(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    x, y = torch.randn(4, 6).double(), torch.randint(3, (4,))
    before = nn.functional.cross_entropy(model(x), y)
    (wanted,) = torch.autograd.grad(before, [model[0].weight])
    start = model[0].weight.detach().clone()
    options: Any = {"micro_batches": "auto", "loss_fn": nn.CrossEntropyLoss(), "profile_seconds": 0.01}
    options |= {"optimizer": functools.partial(torch.optim.SGD, lr=0.1), "executor": "process"}
    cluster = Cluster((Device("cpu:0"), Device("cpu:1")))

    def kind(plan: Plan) -> str:
        return "one worker" if len(plan.cluster.devices) == 1 else "copies" if plan.data_parallel > 1 else "pipeline"

    def measured(steps: Any, *_: Any) -> list[float]:  # whatever the machine says: as if this one were fastest
        return [float(kind(step.package.plan) != best) for step, _ in steps]

    monkeypatch.setattr(step_search, "step_seconds", measured)
    monkeypatch.setattr(part_counts_module, "_CLOSE", float("inf"))
    monkeypatch.setattr(part_counts_module, "_RACED", 100)
    monkeypatch.setattr(part_counts_module, "_FAR", 0.0)
    with compile_training(model, (x,), {}, cluster, threads=2, **options) as pipe:
        assert kind(pipe.plan) == best
        first, *_ = pipe.plan.cluster.devices
        if best == "one worker":
            assert (first.threads, first.core, pipe.micro_batches) == (2, None, 1)
            assert "micro_batches='auto' took 1 in one worker with 2 threads (1f1b" in pipe.plan.notes[-1]
            assert "1 stage on cpu (2 threads)" in repr(pipe)
        if best == "copies":
            assert f"took {pipe.micro_batches} in 2 data-parallel pipelines (1f1b" in pipe.plan.notes[-1]
            assert "2 pipelines of 1 stage" in repr(pipe)
        assert float(pipe.train_step(x, y)) == pytest.approx(before.item(), rel=1e-12)
        assert torch.allclose(model[0].weight, start - 0.1 * wanted, rtol=1e-10)


def test_where_something_is_given_only_what_goes_with_it_is_tried() -> None:
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh()), torch.randn(8, 6)
    options: Any = {"micro_batches": "auto", "loss_fn": nn.MSELoss(), "profile_seconds": 0.01}
    options |= {"optimizer": functools.partial(torch.optim.SGD, lr=0.1), "executor": "process"}
    cluster = Cluster((Device("cpu:0"), Device("cpu:1")))
    for more in ({"schedule": "1f1b"}, {"executor": "inline"}, {"throttle": {"0>1": Link()}}):
        with compile_training(model, (x,), {}, cluster, threads=2, **options | more) as pipe:
            assert [device.threads for device in pipe.plan.cluster.devices] == [1, 1]
            assert pipe.plan.data_parallel == 1
            assert "worker with" not in pipe.plan.notes[-1]


def test_a_trial_runs_in_workers_and_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, start = torch.randn(8, 6), copy.deepcopy(model.state_dict())
    search = StepSearch(
        model, [x], flatten(((x,), {}))[1], (True,), 8, [Way(make_cluster(2), 2, shared) for shared in (1, 2)],
        ["1f1b"], False, Training(nn.MSELoss(), functools.partial(torch.optim.SGD, lr=0.1)), None, 2.0,
        LowerStep(), Recompute(), profile_seconds=0.02,
    )  # fmt: skip
    found = [(index, search.tried(index)[0]) for index in (0, 1)]
    times = search.raced(found)
    assert len(times) == 2
    assert all(0 < seconds < 10 for seconds in times)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    monkeypatch.setattr(step_search, "free_memory", lambda: 1000)
    with pytest.raises(PlanError, match=r"a trial would need [\d,]+ bytes for weights and activations, 1,000 are free"):
        search.raced(found)


def test_a_pipeline_that_chose_trains_as_plain_pytorch_does() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(12, 6).double(), torch.randint(3, (12,))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    before = nn.functional.cross_entropy(model(x), y)
    (wanted,) = torch.autograd.grad(before, [model[0].weight])
    start = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        pipe = pipecompile.compile(
            model, (x,), mode="train", micro_batches="auto", schedule="1f1b", loss_fn=nn.CrossEntropyLoss(), optimizer=sgd,
            executor="inline", profile_seconds=0.02,
        )  # fmt: skip
    with pipe:
        assert pipe.micro_batches in (2, 4, 6)
        assert f"micro_batches='auto' took {pipe.micro_batches} (1f1b" in pipe.plan.notes[-1]
        assert float(pipe.train_step(x, y)) == pytest.approx(before.item(), rel=1e-12)
    assert torch.allclose(model[0].weight, start - 0.1 * wanted, rtol=1e-10)


def test_a_model_too_big_for_one_device_is_counted_all_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(7)))
    x = torch.randn(32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        pipe = pipecompile.compile(
            model, (x,), mode="train", micro_batches="auto", schedule="1f1b", memory="260 KiB", loss_fn=nn.MSELoss(),
            optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), executor="inline", profile_seconds=0.02,
        )  # fmt: skip
    with pipe:
        note = pipe.plan.notes[-1]
        assert [count for count in (4, 8, 16) if f"{count}: " in note] == [4, 8, 16]
        assert "the model needs" not in note, note


def test_what_slows_devices_down_is_measured_only_where_it_can_decide() -> None:
    counts, asked = [2, 4, 8], list[int]()

    def slower(index: int, found: Sequence[Candidate]) -> list[Candidate]:
        asked.append(counts[index])
        by = 1.3 if counts[index] == 2 else 1.0
        return [c.costing([cost.slowed(by) for cost in c.costs]) for c in found]

    def tried(i: int) -> list[Candidate]:  # alone, 2 is fastest and 8 slowest
        return split(2, 0.0, (0.1, 0.11, 0.2)[i])

    index, chosen, (note,) = best_way(list(map(str, counts)), no_bound, tried, ChooseStep(), slower)
    assert asked == [2, 4]
    assert counts[index] == 4
    assert chosen.seconds == min(c.seconds for c in tried(1))
    assert ", measured alone), keeps" in note.partition("8: ")[2]


def test_what_there_is_to_try() -> None:
    def names(cluster: Cluster, threads: int, data_parallel: int | None = None) -> list[str]:
        return [way.name for way in every_way(cluster, [2, 3, 4], data_parallel, threads, False)]

    two, one = make_cluster(2), make_cluster(1)
    copies = ["2 in 2 data-parallel pipelines", "4 in 2 data-parallel pipelines"]
    assert names(two, 2) == ["1 in one worker with 2 threads", *copies, "2", "3", "4"]
    assert names(two, 1) == ["1 in one worker", *copies, "2", "3", "4"]  # two devices on one core
    assert names(two, 0) == [*copies, "2", "3", "4"]  # devices as they are, by name
    assert names(two, 2, 1) == ["2", "3", "4"]
    assert names(one, 1) == ["2 in one worker", "3 in one worker", "4 in one worker"]
    assert names(Cluster((Device("a"), Device("b", speed=2.0))), 0) == ["2", "3", "4"]
