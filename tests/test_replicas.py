"""Replicated stages, run: results bit-equal to eager and in order, whatever the copies; ends, errors, deaths."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import pipecompile
from pipecompile.errors import PlanError, StageError, WorkerDied
from pipecompile.ir.cluster import Link
from replicated import Net, bad, compiled, net, samples

COPIES = [(2,), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (4, 2), (1, 2, 1), (2, 1, 2)]
LENGTHS = (0, 1, 2, 3, 7, 100)


def expected(model: Net, inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with torch.no_grad():
        return [model(x) for x in inputs]


def assert_same(found: Sequence[Any], wanted: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def gone(pids: Sequence[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("ahead", [None, 0, 1])
@pytest.mark.parametrize("copies", COPIES, ids=str)
def test_inline_streams_of_any_length_equal_eager_in_order(copies: tuple[int, ...], ahead: int | None) -> None:
    model = net()
    wanted = expected(model, samples(100))
    for length in LENGTHS:
        # Each stream begins at another residue: the pipeline goes on counting.
        with compiled(model, samples(1)[0], copies, ahead=ahead) as pipe:
            assert_same(list(pipe.stream(samples(length))), wanted[:length])
            assert_same(list(pipe.stream(samples(7))), wanted[:7])
            assert_same([pipe(samples(1)[0])], wanted[:1])
            assert pipe.counts.submitted == pipe.counts.delivered == length + 8


@pytest.mark.parametrize("copies", [(2,), (1, 2), pytest.param((2, 1, 2), marks=pytest.mark.slow)], ids=str)
def test_worker_processes_equal_eager_and_end_at_any_length(copies: tuple[int, ...]) -> None:
    model = net()
    wanted = expected(model, samples(100))
    for length in LENGTHS if copies == (2,) else (3, 100):
        with compiled(model, samples(1)[0], copies, "process") as pipe:
            assert_same(list(pipe.stream(samples(length))), wanted[:length])
            pids = _pids(pipe)
            assert len(pids) == sum(copies)
        assert gone(pids)


def _pids(pipe: Any) -> tuple[int, ...]:
    return getattr(pipe._engine.session, "pids", ())


def test_every_replica_takes_its_turn() -> None:
    with compiled(net(), samples(1)[0], (1, 2, 1)) as pipe:
        records = list(pipe.stream(samples(20), records=True))
        events = [event for event in pipe.timeline().events if event.activity == "F"]
        stage = pipe.plan.stages[1]
    for event in events:
        if event.stage == 1:
            assert event.device == stage.devices[event.sample % 2]
    assert sorted(event.sample for event in events if event.stage == 1) == list(range(20))
    assert all(len(result.record.stages) == 3 and min(result.record.stages) > 0 for result in records[:10])


@pytest.mark.parametrize("executor", ["inline", "process"])
@pytest.mark.parametrize("copies", [(2,), (2, 3)], ids=str)
def test_a_sample_that_raises_fails_alone(copies: tuple[int, ...], executor: Literal["inline", "process"]) -> None:
    if copies == (2, 3) and executor == "process":
        copies = (1, 2)
    model, inputs = net(), samples(24)
    wanted = expected(model, inputs)
    for at in (1, 5, 6, 23):
        inputs[at] = bad()
    with compiled(model, samples(1)[0], copies, executor) as pipe:
        found = list(pipe.stream(inputs, on_error="return"))
        assert len(found) == 24
        for index, one in enumerate(found):
            if index in (1, 5, 6, 23):
                assert isinstance(one, StageError)
                assert one.sample == index
            else:
                assert_same([one], [wanted[index]])
        assert (pipe.counts.delivered, pipe.counts.failed) == (20, 4)


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_closed_in_the_middle_of_a_stream(executor: Literal["inline", "process"]) -> None:
    for taken in (1, 4):
        pipe = compiled(net(), samples(1)[0], (2, 1), executor)
        stream = pipe.stream(cycle(samples(10)))
        assert_same(list(islice(stream, taken)), expected(net(), samples(taken)))
        pids = _pids(pipe)
        pipe.close()
        assert gone(pids)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_replica_ends_the_pipeline_with_its_name(victim: int) -> None:
    with compiled(net(), samples(1)[0], (2,), "process") as pipe:
        stream = pipe.stream(cycle(samples(10)))
        next(stream)
        pids = _pids(pipe)
        os.kill(pids[victim], signal.SIGKILL)
        with pytest.raises(WorkerDied, match=f"device {victim} .*replica {victim} of 2.* SIGKILL") as caught:
            list(islice(stream, 1000))
        assert caught.value.device == victim
    assert gone(pids)


def test_a_killed_replica_is_replaced_and_nothing_lost() -> None:
    model, inputs = net(), samples(60)
    wanted = expected(model, inputs)
    with compiled(model, samples(1)[0], (2, 1), "process", on_failure="restart") as pipe:
        stream = pipe.stream(inputs)
        found = list(islice(stream, 11))
        os.kill(_pids(pipe)[1], signal.SIGKILL)
        found += list(stream)
        assert_same(found, wanted)


def test_pushed_samples_with_a_throttled_pair_of_stages() -> None:
    model, inputs = net(), samples(9)
    link = Link(2e-3, 1e9)
    with compiled(model, samples(1)[0], (1, 2), "process", throttle={"0>1": link}) as pipe:
        tickets = [pipe.submit(x) for x in inputs]
        assert_same([ticket.result(30) for ticket in tickets], expected(model, inputs))
        waits = [e.end - e.start for e in pipe.timeline().events if e.activity == "wait" and e.edge.startswith("0>1.")]
        assert waits
        assert max(waits) >= 1e-3
    with pytest.raises(pipecompile.PipecompileError, match="no edge '0>7'"):
        compiled(model, samples(1)[0], (1, 2), "process", throttle={"0>7": link})(inputs[0])


def test_latest_lets_one_sample_in_for_each_device() -> None:
    with compiled(net(), samples(1)[0], (2, 1), on_overload="latest") as pipe:
        found = list(pipe.stream(samples(30)))
        assert len(found) + pipe.counts.dropped == 30


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, inputs = net(), samples(10)
    with compiled(model, samples(1)[0], (2, 3)) as pipe:
        pipe.save(tmp_path / "net.pipe")
    with pipecompile.load(tmp_path / "net.pipe", executor="inline") as loaded:
        assert loaded.program == pipe.program
        assert [len(stage.devices) for stage in loaded.plan.stages] == [2, 3]
        assert_same(list(loaded.stream(inputs)), expected(model, inputs))


def test_generated_code_is_plain() -> None:
    with compiled(net(), samples(1)[0], (2, 1)) as pipe:
        sources = {(m.stages[0], m.replica): m.source for m in pipe.package.modules}
        program = pipe.program
    ahead = program.rings("0>1")[0].ahead
    assert "for sample in count(start, 2):" in sources[0, 1]
    assert "if start == 1:" in sources[0, 1]
    assert "stage 0, replica 1 of 2" not in sources[1, 0]
    last = sources[1, 0]
    assert 'from_stage_0 = [link.receiver("0.0>1"), link.receiver("0.1>1")]' in last
    assert "message = yield from_stage_0[sample % 2]" in last
    assert f"from_stage_0[(sample + {ahead}) % 2].post(sample + {ahead})" in last
    assert "for sample in count(start):" in last


def test_a_report_shows_replicas() -> None:
    from pipecompile.report.summary import summarise
    from pipecompile.simulate import simulate

    with compiled(net(), samples(1)[0], (1, 2)) as pipe:
        list(pipe.stream(samples(40)))
        predicted = simulate(pipe.program, pipe.plan, pipe.plan.cluster.link, 40)
        summary = summarise(pipe.package, predicted, pipe.timeline())
    assert [stage.device for stage in summary.stages] == ["cpu:0", "cpu:1, cpu:2"]
    assert {(edge.source, edge.target) for edge in summary.edges} >= {("stage 0", "stage 1.0"), ("stage 1.1", "caller")}
    for stage in summary.stages:
        assert stage.predicted.busy <= 1.0


class Counting(Net):
    """Writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.add_(1)
        y, skip = super().forward(x)
        return y + self.seen, skip


def test_state_across_samples_is_not_replicated() -> None:
    torch.manual_seed(3)
    model = Counting().eval()
    with pytest.raises(PlanError, match=r"replicated, but its layer .* writes to"):
        compiled(model, samples(1)[0], (2,))
    with pipecompile.compile(model, (samples(1)[0],), devices=2, replicate=True, executor="inline",
                             profile_seconds=0.05, use_cache=False) as pipe:  # fmt: skip
        written = {i for i, layer in enumerate(pipe.plan.layer_names) if "seen" in layer}
        assert not any(stage.replicas and written.intersection(stage.layers) for stage in pipe.plan.stages)


def test_compile_takes_the_faster_of_stages_and_replicas() -> None:
    torch.manual_seed(0)
    # One layer holds nearly all the work: no cut can balance it, and replicas can.
    model = torch.nn.Sequential(torch.nn.Linear(8, 900), torch.nn.Linear(900, 900), torch.nn.Linear(900, 8)).eval()
    x = torch.randn(64, 8)
    with pipecompile.compile(model, (x,), devices=2, replicate=True, executor="inline", profile_seconds=0.3) as pipe:
        assert [len(stage.devices) for stage in pipe.plan.stages] == [2]
        assert any("by simulation 2 stages" in note for note in pipe.plan.notes)
        with torch.no_grad():
            assert torch.equal(pipe(x), model(x))
