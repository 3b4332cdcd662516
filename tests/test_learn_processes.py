"""Learning in worker processes: the same numbers, and what happens when a worker dies, hangs or raises."""

from __future__ import annotations

import gc
import os
import signal
import time
import warnings
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from learners import learning, network, same, stream
from pipecompile import Learned, LearningPipeline
from pipecompile.errors import PipecompileWarning, PipelineClosed, StepError, WorkerDied, WorkerHung
from pipecompile.runtime import nursery
from pipecompile.runtime.process_learn import ProcessLearner


def pids(pipe: LearningPipeline) -> tuple[int, ...]:
    learner = pipe._learner
    assert isinstance(learner, ProcessLearner)
    return learner.pids


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def descriptors() -> int:
    nursery.prepare()  # stays for the next pipeline
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("updates", "group"), [("weight_stashing", 1), ("sideways", 1), ("sync", 3)])
def test_workers_learn_what_one_process_learns(updates: str, group: int) -> None:
    samples = stream(30, without=(2, 11))
    with learning(network(), 2, updates, accumulate=group) as pipe:
        wanted = [*pipe.learn(samples[:20]), *pipe.learn(samples[20:])]
        final = pipe.snapshot()
    before = descriptors()
    with learning(network(), 2, updates, accumulate=group, executor="process") as pipe:
        found: list[Any] = []
        snapshots: list[dict[str, Any]] = []
        for result in pipe.learn(samples[:20]):
            found.append(result)
            if result.seq == 5:
                snapshots.append(pipe.snapshot())
        found += pipe.learn(samples[20:])
        workers, end = pids(pipe), pipe.snapshot()
        # The caller's own parameters are those of the workers.
        assert same(end["model"], dict(pipe.state_dict()))
        assert same(end["model"], final["model"])
        assert (end["samples"], end["updates"]) == (final["samples"], final["updates"])
    assert [(r.seq, r.loss, r.versions) for r in found] == [(r.seq, r.loss, r.versions) for r in wanted]
    assert all(torch.equal(one.output, other.output) for one, other in zip(found, wanted, strict=True))
    assert all(result.times.latency > 0 for result in found)
    assert all(gone(pid) for pid in workers)
    del pipe, end
    assert descriptors() == before
    if updates != "sideways":  # there the last samples of a stream learn from graphs that it has no newer ones for
        (snapshot,) = snapshots
        with learning(network(), 2, updates, accumulate=group) as pipe:
            list(pipe.learn(samples[: snapshot["samples"]]))
            assert same(pipe.snapshot()["model"], snapshot["model"])


class Loss(nn.Module):
    """Does something to the sample whose targets are all 2."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if bool((target == 2).all()):
            if self.what == "sleep":
                time.sleep(60)
            raise IndexError("no such class")
        return nn.functional.cross_entropy(result, target)


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("raise", StepError, r"stage 1 on device 1 raised IndexError in loss_fn at sample 12: no such class"),
        ("sleep", WorkerHung, r"device 1 \(stages 1\) made no progress for .* after waiting"),
        ("die", WorkerDied, r"device 0 \(stages 0\) was killed by SIGKILL"),
    ],
)
def test_a_worker_that_raises_hangs_or_dies_is_named(what: str, error: type[Exception], said: str) -> None:
    samples = stream(400)
    samples[12] = samples[12][0], torch.full((4,), 2 if what != "die" else 0)
    model, seen = network(), list[int]()
    with learning(model, 2, executor="process", loss_fn=Loss(what), hang_seconds=1.0) as pipe:
        workers = set[int]()
        begun = time.monotonic()

        def note(result: Learned) -> None:
            seen.append(result.seq)
            workers.update(pids(pipe))
            if what == "die" and result.seq == 12:
                os.kill(pids(pipe)[0], signal.SIGKILL)

        with pytest.raises(error, match=said):
            deque(map(note, pipe.learn(samples)), maxlen=0)
        assert time.monotonic() - begun < 30
        assert seen == list(range(len(seen)))
        assert len(seen) == 12 if what != "die" else len(seen) > 12
        assert all(gone(pid) for pid in workers)
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        with pytest.raises(PipelineClosed, match="it failed"):
            pipe.learn(samples)


class Counting(torch.optim.Optimizer):
    """Adds one to every weight, one weight after the other, and takes its time."""

    def __init__(self, weights: list[Any]) -> None:
        super().__init__(weights, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(1.0)
                time.sleep(0.002)


def test_a_worker_that_dies_in_an_update_leaves_the_weights_of_the_one_before() -> None:
    """Under weight stashing updates are made beside what forwards have read, and count when they are complete."""
    model = network()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with learning(model, 3, executor="process", optimizer=Counting, loss_fn=lambda r, t: r.sum() + t.sum()) as pipe:
        seen = list[int]()

        def note(result: Learned) -> None:
            seen.append(result.seq)
            if result.seq == 20:
                os.kill(pids(pipe)[0], signal.SIGKILL)

        with pytest.raises(WorkerDied, match=r"device 0 .* was killed by SIGKILL"):
            deque(map(note, pipe.learn(stream(400))), maxlen=0)
    tensors = pipe._weights.current()
    counts = [
        {float(value) for name in pipe.learn_package.owned[stage] for value in tensors[name].detach().flatten()}
        for stage in range(3)
    ]
    assert all(len(values) == 1 for values in counts), counts
    first, second, last = (value for (value,) in counts)
    assert 10 < first <= second <= last <= len(seen) + 6


def test_closing_in_the_middle_computes_what_is_inside_and_leaves_nothing() -> None:
    before = descriptors()
    pipe = learning(network(), 2, executor="process")
    assert descriptors() == before
    results = pipe.learn(stream(100))
    next(results)
    workers = pids(pipe)
    pipe.close()
    assert all(gone(pid) for pid in workers)
    with pytest.raises(PipelineClosed, match="it was closed"):
        deque(results, maxlen=0)  # some may have come with the first
    dropped = learning(network(), 2, executor="process")
    list(dropped.learn(stream(2)))
    workers = pids(dropped)
    del dropped, results, pipe
    assert descriptors() == before
    assert all(gone(pid) for pid in workers)


def test_after_a_death_learning_goes_on_from_the_last_snapshot_and_says_what_is_learned_again() -> None:
    samples, seen = stream(60), list[int]()
    with learning(network(), 2) as pipe:  # what the workers do when nothing happens
        list(pipe.learn(samples))
        wanted = dict(pipe.state_dict())
    with learning(network(), 2, "sync", executor="process", on_failure="restart", snapshot_every=8) as pipe:
        results = pipe.learn(samples)
        seen += [next(results).seq for _ in range(30)]
        os.kill(pids(pipe)[1], signal.SIGKILL)
        with pytest.warns(PipecompileWarning, match=r"device 1 .* was killed by SIGKILL.* samples are learned again"):
            seen += [result.seq for result in results]
        assert seen == list(range(60))
        assert pipe.restarts == 1
        assert 0 < pipe.relearned < 30
        assert pipe.counts.delivered == 60
        snapshot = pipe.snapshot()
        assert (snapshot["samples"], snapshot["updates"]) == (60, 60)
    with learning(network(), 1) as pipe:  # sync does not care where a stream begins anew
        list(pipe.learn(samples))
        assert same(snapshot["model"], dict(pipe.state_dict()))
    assert not same(snapshot["model"], wanted)


class OfItsOwn(nn.Module):
    """Cross entropy that refuses a target which belongs to another sample: both carry their number."""

    def forward(self, result: tuple[torch.Tensor, torch.Tensor], target: tuple[torch.Tensor, int]) -> torch.Tensor:
        output, number = result
        labels, own = target
        if int(number) != int(own):
            raise AssertionError(f"sample {int(number)} was given the target of {int(own)}")
        return nn.functional.cross_entropy(output, labels)


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner(x), number + 0


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["block", "drop_oldest"])
@pytest.mark.parametrize("updates", ["sync", "weight_stashing", "2bw", "stale", "sideways"])
def test_deaths_lose_no_sample_and_shift_no_target(updates: Any, policy: Any) -> None:
    total, deaths = 600, {5: 1, 40: 0, 41: 1, 150: 1, 300: 0, 420: 1}  # after how many results which worker is killed

    def source() -> Any:
        for k, (x, y) in enumerate(stream(total)):
            if policy != "block":
                time.sleep(0.01)
            yield (x, torch.tensor(k)), None if k % 7 == 3 else (y, torch.tensor(k))

    (x, number), target = next(source())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        pipe = pipecompile.compile(
            Numbered(), (x, number), mode="learn", devices=2, updates=updates, loss_fn=OfItsOwn(),
            optimizer=partial(torch.optim.SGD, lr=0.01), example_targets=target, on_failure="restart",
            snapshot_every=16, profile_seconds=0.02,
        )  # fmt: skip
    seen: list[int] = []
    struck = set[tuple[int, ...]]()  # two deaths at once are one restart
    with pipe, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", PipecompileWarning)
        for result in pipe.learn(source(), on_overload=policy):
            assert int(result.output[1]) == result.seq
            assert (result.loss is None) == (result.seq % 7 == 3)
            seen.append(result.seq)
            if len(seen) in deaths and pipe._learner is not None:
                struck.add(pids(pipe))
                os.kill(pids(pipe)[deaths[len(seen)]], signal.SIGKILL)
        counts = pipe.counts
        assert seen == sorted(set(seen))
        assert (counts.submitted, counts.delivered, counts.in_flight) == (total, len(seen), 0)
        assert counts.dropped == total - len(seen)
        assert policy != "block" or seen == list(range(total))
        assert pipe.restarts == len(said) == len(struck) >= (4 if policy == "block" else 1)
        assert 0 < pipe.relearned < 6 * 40
        learned = sum(seq % 7 != 3 for seq in seen)
        assert policy != "block" or updates == "2bw" or pipe.snapshot()["updates"] == learned
        state = dict(pipe.state_dict())
    if updates == "sync" and policy == "block":
        with learning(network(), 1, optimizer=partial(torch.optim.SGD, lr=0.01)) as plain:
            list(plain.learn([(x, None if k % 7 == 3 else y) for k, (x, y) in enumerate(stream(total))]))
            assert same({name.removeprefix("inner."): value for name, value in state.items()}, dict(plain.state_dict()))
