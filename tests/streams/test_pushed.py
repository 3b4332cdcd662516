"""submit(): tickets, callbacks, results in order, policies, and who may use a pipeline from where."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile import Counts, InputError, Overloaded, PipelineClosed, SampleDropped, StageError, Ticket
from pipecompile.streams.entrance import Options
from pipecompile.streams.pushed import Pushed
from streams.stream_parts import balanced, compiled, inputs, mlp, outputs, same
from streams.test_pulled import Lookups, Watcher, eager, ids

Fast = tuple[pipecompile.InferencePipeline, list[torch.Tensor], list[torch.Tensor]]


@pytest.fixture(scope="module")
def blocking() -> Iterator[Fast]:
    model, xs = mlp(), inputs(97)
    with compiled(model, xs[0], executor="process") as pipe:
        yield pipe, xs, outputs(model, xs)


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_tickets_give_each_sample_its_own_result_in_order(executor: str) -> None:
    model, xs = mlp(), inputs(60)
    over: list[Ticket] = []
    with compiled(model, xs[0], executor=executor) as pipe:
        tickets = [pipe.submit(x, pts=k / 30, callback=over.append) for k, x in enumerate(xs)]
        assert same([ticket.result(timeout=30) for ticket in tickets], outputs(model, xs))
        assert pipe.flush(30)
        assert pipe.counts == Counts(60, 60, 0, 0, 0)
    assert over == tickets
    assert [ticket.sequence for ticket in tickets] == list(range(60))
    assert [ticket.pts for ticket in tickets] == [k / 30 for k in range(60)]
    assert {ticket.state for ticket in tickets} == {"delivered"}
    records = [ticket.record for ticket in tickets]
    assert all(r is not None and r.offered <= r.entered <= r.left and r.pts is not None for r in records)
    assert not tickets[0].cancel()


def test_the_caller_may_use_the_memory_of_a_submitted_sample_again(blocking: Fast) -> None:
    pipe, xs, want = blocking
    frame, tickets = torch.empty(2, 8), []
    for x in xs:
        frame.copy_(x)
        tickets.append(pipe.submit(frame))
    assert same([ticket.result(30) for ticket in tickets], want)


def test_results_are_read_in_another_thread_and_end(blocking: Fast) -> None:
    pipe, xs, want = blocking
    results = pipe.results(records=True)
    pusher = threading.Thread(target=lambda: ([pipe.submit(x, pts=float(k)) for k, x in enumerate(xs)], results.end()))
    pusher.start()
    found = list(results)
    pusher.join(30)
    assert same([result.value for result in found], want)
    assert [result.record.pts for result in found] == [float(k) for k in range(len(xs))]
    numbers = [result.record.sequence for result in found]
    assert numbers == list(range(numbers[0], numbers[0] + len(xs)))


def test_submitting_to_oneself_is_an_error_not_a_deadlock(blocking: Fast) -> None:
    pipe, xs, _ = blocking
    results = pipe.results()
    with pytest.raises(Overloaded, match="the thread that reads results"):
        [pipe.submit(xs[0]) for _ in range(10_000)]
    results.end()
    count = sum(1 for _ in results)
    assert 64 <= count < 200
    with pytest.raises(StopIteration):
        next(results)
    assert pipe.counts.in_flight == 0


def test_results_nobody_reads_any_more_hold_nothing_up(blocking: Fast) -> None:
    pipe, xs, want = blocking
    results = pipe.results()
    del results
    gc.collect()
    assert same([pipe.submit(x).result(30) for x in xs], want)


def test_tickets_nobody_keeps_cost_no_memory(blocking: Fast) -> None:
    pipe, xs, _ = blocking
    alive: weakref.WeakSet[Ticket] = weakref.WeakSet()
    with Watcher(pipe) as watcher:
        for k in range(3_000):
            alive.add(pipe.submit(xs[k % len(xs)]))
            if k % 500 == 0:
                assert len(alive) < 100
    assert pipe.flush(30)
    gc.collect()
    assert len(alive) <= 1
    assert watcher.most < 100
    assert pipe.counts.in_flight == 0


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_sample_that_raises_fails_its_ticket_only(executor: str) -> None:
    xs = ids(12, (3,), (7, 8))
    want = eager(Lookups().eval(), xs)
    with compiled(Lookups(), *xs[0], executor=executor) as pipe:
        results = pipe.results(on_error="return")
        tickets = [pipe.submit(x) for x in xs]
        results.end()
        for k, (ticket, expected) in enumerate(zip(tickets, want, strict=True)):
            if expected is None:
                with pytest.raises(StageError, match=f"at sample {k} "):
                    ticket.result(30)
                assert ticket.state == "failed"
            else:
                assert torch.equal(ticket.result(30), expected)
        assert [isinstance(y, StageError) for y in results] == [y is None for y in want]
        assert pipe.counts == Counts(12, 9, 0, 3, 0)


def test_a_sample_that_does_not_fit_is_refused_at_once(blocking: Fast) -> None:
    pipe, xs, want = blocking
    before = pipe.counts
    for bad in (torch.zeros(3, 8), torch.zeros(2, 8).double(), torch.zeros(2, 8, device="meta"), (xs[0], xs[0]), 3):
        with pytest.raises(InputError):
            pipe.submit(bad)
    assert pipe.counts == before
    assert torch.equal(pipe.submit(xs[0]).result(30), want[0])


class Gate(nn.Module):
    """Slow enough (a few ms) that a loop of submits is far too fast."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def gate() -> Iterator[pipecompile.InferencePipeline]:
    """Workers for all policies; each test opens a door of its own."""
    with compiled(Gate(), *inputs(1, 64, 512), executor="process") as pipe:
        yield pipe


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "latest", "error", "block"])
def test_policies_at_the_door(gate: pipecompile.InferencePipeline, policy: Any) -> None:
    xs = inputs(5, 64, 512)
    want, refused, tickets = outputs(Gate(), xs), 0, []
    pipe = gate
    pipe._pushed = Pushed(pipe._engine, Options(policy, max_in_flight=2))
    before = pipe.counts
    with Watcher(pipe) as watcher:
        for k in range(150):
            try:
                tickets.append(pipe.submit(xs[k % 5], pts=float(k)))
            except Overloaded:
                refused += 1
        assert pipe.flush(60)
    counts = pipe.counts
    assert watcher.most <= 5, "two wait, two are inside, one is on its way"
    states = [ticket.state for ticket in tickets]
    dropped = states.count("dropped")
    assert counts.submitted - before.submitted == 150
    assert counts.delivered - before.delivered == states.count("delivered")
    assert counts.dropped - before.dropped == dropped + refused
    assert counts.failed == counts.in_flight == 0
    for ticket in tickets:
        if ticket.state == "dropped":
            with pytest.raises(SampleDropped, match=f"sample {ticket.sequence} was dropped .* on_overload='{policy}'"):
                ticket.result(0)
        else:
            assert ticket.pts is not None
            assert torch.equal(ticket.result(0), want[int(ticket.pts) % 5])
    if policy == "block":
        assert dropped == refused == 0
    elif policy == "error":
        assert dropped == 0 < refused
    else:
        assert refused == 0 < dropped
        assert (states[-1] == "dropped") == (policy == "drop_newest")


def test_a_submitted_sample_that_cannot_enter_in_time_is_dropped(gate: pipecompile.InferencePipeline) -> None:
    (x,) = inputs(1, 64, 512)
    gate._pushed = Pushed(gate._engine, Options(max_in_flight=1, deadline=0.0005))
    tickets = [gate.submit(x) for _ in range(20)]
    assert gate.flush(60)
    late = [ticket for ticket in tickets if ticket.state == "dropped"]
    assert late
    assert "after its deadline" in str(late[0].exception())
    assert balanced(gate.counts)


def test_waiting_at_a_full_entrance_can_be_limited(gate: pipecompile.InferencePipeline) -> None:
    (x,) = inputs(1, 64, 512)
    gate._pushed = Pushed(gate._engine, Options(max_in_flight=1))
    with pytest.raises(Overloaded, match=r"no room for another sample within 0\.0 s"):
        [gate.submit(x, timeout=0.0) for _ in range(50)]
    assert gate.flush(60)


def test_closing_fails_what_is_in_flight_and_wakes_everybody() -> None:
    model, xs = Gate().eval(), inputs(1, 64, 512)
    pipe = compiled(model, xs[0], executor="process")
    results = pipe.results(on_error="skip")
    reader = threading.Thread(target=lambda: list(results))
    reader.start()
    tickets = [pipe.submit(xs[0]) for _ in range(6)]
    pipe.close()
    reader.join(30)
    assert not reader.is_alive()
    for ticket in tickets:
        error = ticket.exception(timeout=30)
        assert error is None or isinstance(error, PipelineClosed)
    assert balanced(pipe.counts)
    assert pipe.counts.in_flight == 0
    with pytest.raises(PipelineClosed, match="it was closed"):
        pipe.submit(xs[0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_is_refused_and_its_parent_goes_on(blocking: Fast) -> None:
    pipe, xs, want = blocking
    stream = pipe.stream(xs)
    assert torch.equal(next(stream), want[0])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            refused = 0
            for use in (lambda: pipe(xs[0]), lambda: next(stream), lambda: pipe.submit(xs[0]), pipe.results):
                try:
                    use()
                except PipelineClosed as error:
                    refused += "fork" in str(error)
            stream.close()
            pipe.close()
            code = 0 if refused == 4 else refused + 10
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(stream, want[1:])
    assert torch.equal(pipe.submit(xs[0]).result(30), want[0])


def test_two_pipelines_at_once_and_in_threads(blocking: Fast) -> None:
    pipe, xs, want = blocking
    other_model, found = mlp(), {}
    with torch.no_grad():
        other_model[0].weight.neg_()

    def start_in_a_thread() -> None:
        found["other"] = compiled(other_model, xs[0], executor="process")
        found["first"] = found["other"](xs[0])

    # Its workers were started in a thread that is gone afterwards, and must not be gone with it.
    starter = threading.Thread(target=start_in_a_thread)
    starter.start()
    starter.join(60)
    with found["other"] as other:
        time.sleep(0.2)
        other_want = outputs(other_model, xs)
        assert torch.equal(found["first"], other_want[0])
        streams = zip(pipe.stream(xs), other.stream(xs), strict=True)
        assert all(
            torch.equal(a, c) and torch.equal(b, d) for (a, b), c, d in zip(streams, want, other_want, strict=True)
        )


def test_tickets_can_be_awaited(blocking: Fast) -> None:
    pipe, xs, want = blocking

    async def main() -> list[torch.Tensor]:
        return [await asyncio.wrap_future(ticket) for ticket in [pipe.submit(x) for x in xs[:20]]]

    assert same(asyncio.run(main()), want[:20])


CELL = """
import asyncio, torch, pipecompile

CELL = '''
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).eval()
x = torch.randn(2, 8)
pipe = pipecompile.compile(model, x, devices=2, profile_seconds=0.05)
y = next(pipe.stream([x, x]))
z = pipe.submit(x)
'''


async def kernel():
    # As a notebook does it: cells executed in a namespace of their own, inside a running event loop.
    cell = {"torch": torch, "pipecompile": pipecompile, "__name__": "__main__"}
    exec(compile(CELL.replace("z = ", "del y; import gc; gc.collect(); z = "), "<cell>", "exec"), cell)
    z = await asyncio.wrap_future(cell["z"])
    assert torch.allclose(z, cell["model"](cell["x"]))
    print("fine")


asyncio.run(kernel())
"""


def test_a_notebook_needs_no_main_guard_and_no_close() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", CELL], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_pipeline_nobody_holds_ends_even_after_submitting() -> None:
    pipe = compiled(mlp(), inputs(1)[0], executor="process")
    pipe.submit(inputs(1)[0]).result(30)
    session = weakref.ref(pipe._engine.session)
    pids = pipe._engine.session.pids  # type: ignore[union-attr]
    del pipe
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert session() is None
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_results_begin_with_what_is_submitted_after_them(blocking: Fast) -> None:
    pipe, xs, want = blocking
    early = [pipe.submit(x) for x in xs[:10]]
    results = pipe.results()
    late = [pipe.submit(x) for x in xs[10:20]]
    results.end()
    assert same(results, want[10:20])
    assert all(ticket.done() for ticket in early + late)


def test_who_has_the_last_result_may_go_on_at_once_in_another_way(blocking: Fast) -> None:
    pipe, xs, want = blocking
    for i in range(60):
        assert torch.equal(pipe.submit(xs[i]).result(30), want[i])
        assert torch.equal(pipe(xs[i + 1]), want[i + 1])
        pipe.submit(xs[i])
        assert pipe.flush(30)
        assert same(pipe.stream(xs[i : i + 2]), want[i : i + 2])
    with pytest.raises(InputError, match="callback=5 is no function"):
        pipe.submit(xs[0], callback=5)  # type: ignore[arg-type]  # pyright: ignore
    assert balanced(pipe.counts)


def test_a_callback_may_submit_but_not_wait(blocking: Fast) -> None:
    pipe, xs, want = blocking
    found: list[Any] = []

    def again(ticket: Ticket) -> None:
        try:
            pipe.flush()
        except InputError as error:
            found.append(error)
        try:
            found.append([pipe.submit(xs[1]) for _ in range(200)])
        except Overloaded as error:
            found.append(error)

    assert torch.equal(pipe.submit(xs[0], callback=again).result(30), want[0])
    assert pipe.flush(60)
    assert isinstance(found[0], InputError)
    assert isinstance(found[1], Overloaded)
    assert torch.equal(pipe(xs[0]), want[0])
