"""Workers that are killed, hang or die of a sample: replaced, and nothing lost or computed twice for the caller."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_packages import expected, samples, two_stages, weights

from pipecompile.errors import PipelineClosed, PipelineError, StageError, WorkerDied
from pipecompile.runtime.session import Session
from pipecompile.runtime.surviving import SNAPSHOT_EVERY, TRIES, Surviving
from streams.stream_parts import Stateful, balanced, compiled, inputs, mlp, outputs, same


class Mortal:
    """An executor of one stage that adds to a total, and dies at the samples and moments a test asks for."""

    def __init__(self, total: torch.Tensor, fatal: Callable[[float], bool]) -> None:
        self.total, self._fatal = total, fatal
        self.line: deque[tuple[int, float]] = deque()
        self.submitted = self.delivered = 0
        self.closed = False

    @property
    def in_flight(self) -> int:
        return self.submitted - self.delivered

    def submit(self, leaves: Sequence[Any]) -> int | None:
        if len(self.line) == 3:
            return None
        self.line.append((self.submitted, float(leaves[0])))
        self.submitted += 1
        return self.submitted - 1

    def result(self, timeout: float | None = None) -> tuple[int, list[Any]]:
        if not self.line:
            raise PipelineError("a result was awaited, but no sample is in flight")
        number, value = self.line[0]
        self.total += value
        if self._fatal(value):
            self.closed = True
            raise WorkerDied("the worker died", device=0, sample=number)
        self.line.popleft()
        self.delivered += 1
        if value < 0:
            raise StageError(raised="ValueError", reason="negative", sample=number)
        return number, [self.total.clone()]

    def poll(self) -> tuple[int, list[Any]] | None:
        return self.result() if self.line else None

    def wait(self, timeout: float | None = None, *, or_result: bool = True) -> bool:
        return len(self.line) < 3

    def turn(self, timeout: float | None = None, *, room: bool = True) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def stream(executor: Any, values: Sequence[float], take: str = "result") -> list[Any]:
    """Everything an executor makes of the values, errors in their place."""
    found: list[Any] = []

    def collect() -> None:
        try:
            taken = getattr(executor, take)()
        except StageError as error:
            taken = error.sample, error
        if taken is not None:
            assert taken[0] == len(found)
            found.append(taken[1] if isinstance(taken[1], StageError) else float(taken[1][0]))

    for value in values:
        while executor.submit([torch.tensor(value)]) is None:
            if not executor.wait():
                collect()
    while executor.in_flight:
        collect()
    return found


def running_totals(values: Sequence[float]) -> list[Any]:
    """What one process without accidents would give; a negative value counts, but has no result."""
    total, found = 0.0, []
    for value in values:
        total += value
        found.append(None if value < 0 else total)
    return found


@pytest.mark.parametrize("take", ["result", "poll"])
@pytest.mark.parametrize("seed", range(20))
def test_a_model_with_state_gives_each_result_once_whatever_dies_when(seed: int, take: str) -> None:
    generator = random.Random(seed)
    values = [float(generator.choice([1, 2, 3, 5, 8, -1])) for _ in range(150)]
    total, last = torch.zeros(()), [0]

    def fatal(_value: float) -> bool:
        last[0] += 1
        return generator.random() < 0.05

    executor = Surviving(lambda: Mortal(total, fatal), {"total": total}, tries=10_000)  # type: ignore[arg-type, return-value]
    found = stream(executor, values, take)
    assert [None if isinstance(y, StageError) else y for y in found] == running_totals(values)
    assert [y.sample for y in found if isinstance(y, StageError)] == [k for k, v in enumerate(values) if v < 0]
    assert executor.restarts > 0
    assert float(total) == sum(values)
    assert last[0] > len(values), "samples were computed again"


def test_copies_are_kept_no_longer_than_needed() -> None:
    total = torch.zeros(())
    stateless = Surviving(lambda: Mortal(total, lambda v: False), {})  # type: ignore[arg-type, return-value]
    stateful = Surviving(lambda: Mortal(total, lambda v: False), {"total": total})  # type: ignore[arg-type, return-value]
    for executor, most in ((stateless, 3), (stateful, SNAPSHOT_EVERY)):
        kept: list[int] = []
        for k in range(200):
            while executor.submit([torch.tensor(float(k))]) is None:
                executor.result()
            kept.append(len(executor._kept))
        assert max(kept) <= most
        executor.close()


def test_what_the_caller_changes_between_streams_is_not_undone() -> None:
    total, dead = torch.zeros(()), [False]

    def fatal(value: float) -> bool:
        dies, dead[0] = value == 7.0 and not dead[0], dead[0] or value == 7.0
        return dies

    executor = Surviving(lambda: Mortal(total, fatal), {"total": total})  # type: ignore[arg-type, return-value]
    assert stream(executor, [1.0, 2.0]) == [1.0, 3.0]
    total.fill_(100.0)
    executor._delivered = executor._submitted = 0  # the helper counts from 0
    executor._base = -2
    assert stream(executor, [7.0, 1.0]) == [107.0, 108.0]
    assert executor.restarts == 1


@pytest.mark.parametrize("stateful", [False, True])
def test_a_sample_that_kills_every_worker_ends_in_one_exception(stateful: bool) -> None:
    total, born = torch.zeros(()), [0]

    def start() -> Any:
        born[0] += 1
        return Mortal(total, lambda value: value == 13.0)

    executor = Surviving(start, {"total": total} if stateful else {})
    with pytest.raises(
        WorkerDied, match=f"restarted {TRIES} times, .* before sample 5, the oldest in flight"
    ) as caught:
        stream(executor, [1.0, 2.0, 3.0, 4.0, 5.0, 13.0, 6.0])
    assert caught.value.sample == 5
    assert born[0] == 1 + TRIES
    assert executor.closed


def test_a_worker_that_dies_while_starting_counts() -> None:
    total, births = torch.zeros(()), [0]

    def start() -> Any:
        births[0] += 1
        if births[0] > 1:
            raise WorkerDied("it was killed while starting")
        return Mortal(total, lambda value: True)

    executor = Surviving(start, {})
    with pytest.raises(WorkerDied, match="while starting; it was restarted"):
        stream(executor, [1.0])
    assert births[0] == 1 + TRIES


def test_real_workers_that_hang_once_or_die_of_a_sample(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    body = (
        f"if float(x[0, 0]) > 1e6: os._exit(3)\n"
        f"if sample == 4 and not os.path.exists({str(mark)!r}):\n    open({str(mark)!r}, 'w').close()\n"
        "    time.sleep(1000)\ny = torch.relu(x @ b)"
    )
    state, xs = weights(), samples(8)
    built = two_stages(second=body)
    with Surviving(lambda: Session(built, state, hang_seconds=0.4), {}) as executor:  # type: ignore[arg-type]
        found: list[Any] = []
        for x in xs:
            while executor.submit([x]) is None:
                if not executor.wait():
                    found.append(executor.result())
        while executor.in_flight:
            found.append(executor.result())
        assert [number for number, _ in found] == list(range(8))
        assert all(torch.equal(y, expected(state, x)) for x, (_, (y,)) in zip(xs, found, strict=True))
        assert executor.restarts == 1
        executor._limit = 1
        executor.submit([torch.full((4, 8), 1e9)])
        with pytest.raises(WorkerDied, match=r"restarted 1 times.*sample 8"):
            executor.result()
        assert executor.closed


def kill_at_random(pipe: Any, kills: int, xs: list[torch.Tensor], want: list[torch.Tensor], seed: int) -> None:
    """Stream while a thread kills workers; every result once, in order, bit for bit."""
    generator, stopped = random.Random(seed), threading.Event()
    killed: list[int] = []
    progress = [0]

    def killer() -> None:
        while len(killed) < kills and not stopped.is_set():
            seen = progress[0]
            time.sleep(generator.uniform(0.0, 0.3))
            session = pipe._engine.session
            # Only where there was progress since: three deaths without any are a sample's fault.
            if session is None or progress[0] == seen:
                continue
            pid = generator.choice(session.pids)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.append(pid)

    thread = threading.Thread(target=killer)

    def source() -> Iterator[torch.Tensor]:
        k = 0
        while len(killed) < kills or k % len(xs):
            yield xs[k % len(xs)]
            k += 1

    thread.start()
    try:
        for k, y in enumerate(pipe.stream(source(), records=True)):
            assert y.record.sequence == k
            assert torch.equal(y.value, want[k % len(want)])
            progress[0] += 1
    finally:
        stopped.set()
        thread.join()
    assert len(killed) == kills
    counts = pipe.counts
    assert balanced(counts)
    assert counts.delivered == counts.submitted == progress[0]
    assert pipe.restarts >= kills / 2  # a second kill may hit a crew that is dead already


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_workers_are_replaced_and_every_sample_comes_once(kills: int) -> None:
    model, xs = mlp(), inputs(50)
    with compiled(model, xs[0], executor="process", on_failure="restart") as pipe:
        kill_at_random(pipe, kills, xs, outputs(model, xs), seed=kills)
        pids = pipe._engine.session.pids  # type: ignore[union-attr]
    gc.collect()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_buffers_written_in_forward_survive_kills(kills: int) -> None:
    torch.manual_seed(0)
    model, reference, xs = Stateful().eval(), Stateful().eval(), inputs(40)
    reference.load_state_dict(model.state_dict())
    random_ = random.Random(kills)
    with compiled(model, xs[0], executor="process", on_failure="restart") as pipe:
        for _ in range(kills):
            victim, when = random_.randrange(2), random_.randrange(1, 39)
            want = outputs(reference, xs)
            for k, y in enumerate(pipe.stream(xs)):
                assert torch.equal(y, want[k])
                if k == when:
                    os.kill(pipe._engine.session.pids[victim], signal.SIGKILL)  # type: ignore[union-attr]
            assert torch.equal(model.mean, reference.mean)
        # A worker that is killed when it has done its part of a stream is missed in the next one only.
        assert kills / 2 <= pipe.restarts <= kills


def test_submitted_samples_survive_too_and_an_idle_death_goes_unseen() -> None:
    model, xs = mlp(), inputs(30)
    want = outputs(model, xs)
    with compiled(model, xs[0], executor="process", on_failure="restart") as pipe:
        tickets = [pipe.submit(x) for x in xs]
        os.kill(pipe._engine.session.pids[0], signal.SIGKILL)  # type: ignore[union-attr]
        assert same([ticket.result(60) for ticket in tickets], want)
        os.kill(pipe._engine.session.pids[1], signal.SIGKILL)  # type: ignore[union-attr]
        assert torch.equal(pipe(xs[0]), want[0])
        assert pipe.restarts in (1, 2)


def test_without_restart_a_death_is_one_named_exception_and_the_account_closes() -> None:
    model, xs = mlp(), inputs(50)
    with compiled(model, xs[0], executor="process") as pipe:
        stream_ = pipe.stream(xs)
        next(stream_)
        os.kill(pipe._engine.session.pids[1], signal.SIGKILL)  # type: ignore[union-attr]
        with pytest.raises(WorkerDied, match=r"device 1 \(stages 1\) was killed by SIGKILL") as caught:
            list(stream_)
        assert any("of the stream had no result yet" in note for note in caught.value.__notes__)
        assert balanced(pipe.counts)
        assert pipe.counts.in_flight == 0
        assert pipe.counts.failed > 0
        with pytest.raises(StopIteration):
            next(stream_)
        with pytest.raises(PipelineClosed, match="SIGKILL") as again:
            pipe(xs[0])
        assert again.value.__cause__ is caught.value


def test_tickets_of_a_dead_pipeline_fail_by_name() -> None:
    model, xs = mlp(), inputs(10)
    with compiled(model, xs[0], executor="process") as pipe:
        pipe.submit(xs[0]).result(30)
        os.kill(pipe._engine.session.pids[0], signal.SIGKILL)  # type: ignore[union-attr]
        with pytest.raises((WorkerDied, PipelineClosed), match="SIGKILL"):
            [pipe.submit(x).result(30) for x in xs]
        assert pipe.counts.in_flight == 0


HOLDER = """
import os, sys, time
sys.path.insert(0, {tests!r})
from runtime_packages import two_stages, weights, samples
from pipecompile.runtime.session import Session
# PyDLL keeps the GIL while the C function runs: no Python thread of the worker can do anything.
session = Session(two_stages(second="import ctypes; ctypes.PyDLL(None).sleep(60); y = x @ b"), weights())
session.submit(samples(1))
time.sleep(0.5)
print(*session.pids, flush=True)
time.sleep(60)
"""


def test_a_worker_stuck_in_an_extension_that_holds_the_gil_follows_its_parent() -> None:
    source = textwrap.dedent(HOLDER.format(tests=str(Path(__file__).parent)))
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2
        process.kill()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
