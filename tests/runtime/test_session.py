from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from runtime_packages import (
    chain_module,
    edge,
    expected,
    package,
    run_all,
    samples,
    skip_package,
    two_stages,
    weights,
)

from pipecompile.errors import (
    InputError,
    PipecompileError,
    PipelineClosed,
    PipelineError,
    StageError,
    WorkerDied,
    WorkerHung,
)
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import OutputRef, Symbol, TensorSpec
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.program import HOST
from pipecompile.runtime import nursery
from pipecompile.runtime.executor import ResultTimeout
from pipecompile.runtime.inline import InlineSession
from pipecompile.runtime.session import Session


def children() -> set[int]:
    """Child processes and theirs, zombies included."""
    found: set[int] = set()
    ask = [os.getpid()]
    while ask:
        tasks = Path(f"/proc/{ask.pop()}/task").iterdir()
        new = {int(pid) for task in tasks for pid in (task / "children").read_text().split()} - found
        found |= new
        ask += new
    return found


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: tuple[int, ...], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(alive(pid) for pid in pids)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    nursery.prepare()
    gc.collect()
    before = children(), descriptors(), set(os.listdir("/dev/shm"))
    yield
    gc.collect()
    assert (children(), descriptors(), set(os.listdir("/dev/shm"))) == before


@pytest.fixture(scope="module")
def shared() -> Iterator[Session]:
    """One session for all tests that leave it as they found it."""
    with Session(two_stages(), weights()) as session:
        yield session


def test_stream_of_a_thousand_equals_torch_in_order() -> None:
    state, xs = weights(), samples(1000)
    with Session(two_stages(), state) as session:
        results = run_all(session, xs)
        assert session.in_flight == 0
        found = session.timeline()
    assert [number for number, _ in results] == list(range(1000))
    for x, (_, (y,)) in zip(xs, results, strict=True):
        assert torch.equal(y, expected(state, x))
    assert found.origin == "measured"
    assert len(found.finishes) == len(found.latencies) == 1000
    assert found.finishes == tuple(sorted(found.finishes))
    computed = [(e.device, e.sample) for e in found.events if e.activity == "F"]
    assert sorted(computed) == [(device, sample) for device in (0, 1) for sample in range(1000)]
    assert all(e.end >= e.start >= 0 for e in found.events)


def test_skip_edges_numbers_inputs_and_weights_as_results() -> None:
    state = {"w": torch.tensor(0.5)}
    xs = [torch.randn(3, 4) for _ in range(40)]
    with Session(skip_package(), state) as session:
        results = run_all(session, xs)
    with InlineSession(skip_package(), state) as inline:
        inline_results = run_all(inline, xs)
    for x, (_, (z, h, same, w)), (_, others) in zip(xs, results, inline_results, strict=True):
        assert torch.equal(h, x * 2)
        assert torch.equal(z, (x * 2 + 1) * (x * 2) * 3 * 0.5)
        assert same is x
        assert w is state["w"]
        assert torch.equal(others[0], z)
        assert torch.equal(others[1], h)


def test_results_own_their_memory(shared: Session) -> None:
    results = run_all(shared, samples(20))
    assert len({y.data_ptr() for _, (y,) in results}) == 20
    assert torch.equal(results[0][1][0], expected(weights(), samples(1)[0]))


def test_backpressure_bounds_what_is_in_flight() -> None:
    slow = two_stages(second="time.sleep(0.01)\ny = torch.relu(x @ b)")
    state, xs = weights(), samples(1)
    with Session(slow, state) as session:
        accepted = 0
        deadline = time.monotonic() + 20
        while session.wait(timeout=0.5, or_result=False) and time.monotonic() < deadline:
            accepted += session.submit(xs) is not None
        # Two slots each on host>0, 0>1 and 1>host, and what the two stages hold.
        assert 4 <= accepted <= 8
        assert session.submit(xs) is None
        assert session.in_flight == accepted
        assert [session.result(timeout=10)[0] for _ in range(accepted)] == list(range(accepted))
        assert session.poll() is None
        with pytest.raises(ResultTimeout):
            session.result(timeout=0.01)


def test_a_wait_comes_back_for_a_result(shared: Session) -> None:
    while shared.submit(samples(1)) is not None or shared.wait(timeout=0.3, or_result=False):
        pass
    assert shared.wait(timeout=10) is False
    while shared.in_flight:
        shared.result(timeout=10)


def test_submitting_and_taking_in_two_threads(shared: Session) -> None:
    xs = samples(300)
    results: list[tuple[int, list[torch.Tensor]]] = []

    def take() -> None:
        while len(results) < len(xs):
            results.append(shared.result(timeout=20))

    taker = threading.Thread(target=take)
    taker.start()
    for x in xs:
        while shared.submit([x]) is None:
            shared.wait(timeout=20, or_result=False)
    taker.join(20)
    assert all(torch.equal(y, expected(weights(), x)) for x, (_, (y,)) in zip(xs, results, strict=True))


def test_wrong_input_is_refused_and_the_stream_goes_on(shared: Session) -> None:
    xs = samples(2)
    first = shared.submit([xs[0]])
    assert first is not None
    shared.wait(timeout=10, or_result=False)
    with pytest.raises(InputError, match=r"'x' is a float32 tensor of shape \(1, 8\)"):
        shared.submit([xs[0][:1]])
    with pytest.raises(InputError, match="float64"):
        shared.submit([xs[0].double()])
    with pytest.raises(InputError, match="takes 1 tensors and numbers, got 2"):
        shared.submit([xs[0], xs[0]])
    assert shared.in_flight == 1
    assert shared.submit([xs[1].requires_grad_()]) == first + 1
    for x in xs:
        (y,) = shared.result(timeout=10)[1]
        assert torch.equal(y, expected(weights(), x))
        assert not y.requires_grad
    with pytest.raises(PipelineError, match="no sample is in flight"):
        shared.result()


def test_layouts_of_host_edges_survive() -> None:
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    body = "assert x.is_contiguous(memory_format=torch.channels_last)\ny = x + 1"
    built = package(
        [chain_module(0, body, source="host>0", target="0>host")],
        [edge(HOST, 0, {"x": x}), edge(0, HOST, {"y": x})],
        [("x", x)],
        [OutputRef("value", "y")],
    )
    for kind in (Session, InlineSession):
        with kind(built, {}) as session:
            ((_, (y,)),) = run_all(session, [x.contiguous()])
        assert y.stride() == x.stride()
        assert torch.equal(y, x + 1)


@pytest.mark.parametrize("kind", [Session, InlineSession])
def test_dynamic_sizes(kind: type[Session] | type[InlineSession]) -> None:
    spec = TensorSpec((2, 4), "float32", (4, 1), dynamic=True, limit="16*s0")
    built = package(
        [chain_module(0, "y = x.t() * 2", source="host>0", target="0>host")],
        [edge(HOST, 0, {"x": spec}), edge(0, HOST, {"y": spec})],
        [("x", spec)],
        [OutputRef("value", "y")],
        symbols={"s0": Symbol(0, 0, 1, 100)},
    )
    xs = [torch.randn(n, 4) for n in (1, 5, 0, 3)]
    with kind(built, {}, sizes={"s0": 5}) as session:
        results = run_all(session, xs)
        with pytest.raises(InputError, match="room for"):
            session.submit([torch.randn(30, 4)])
    for x, (_, (y,)) in zip(xs, results, strict=True):
        assert torch.equal(y, x.t() * 2)
        assert y.stride() == (x.t() * 2).stride()


def test_changes_in_place_are_seen_and_the_state_is_the_models_own() -> None:
    state, (x,) = weights(), samples(1)
    kept = state["a"]
    with Session(two_stages("a.add_(0)\ny = aten.mm.default(x, a)"), state) as session:
        for _ in range(3):
            ((_, (y,)),) = run_all(session, [x])
            assert torch.equal(y, expected(state, x))
            with torch.no_grad():
                state["a"].mul_(1.5)
        assert session.detached(state) == []
        state["a"].data = state["a"].data.clone()
        assert session.detached(state) == ["a"]
    assert state["a"] is kept


def test_state_written_by_a_stage_is_complete_after_close() -> None:
    state = weights()
    counting = two_stages("a.add_(1)\ntime.sleep(0.001)\ny = aten.mm.default(x, a)")
    before = state["a"].detach().clone()
    with Session(counting, state) as session:
        submitted = sum(session.submit(samples(1)) is not None for _ in range(8))
    assert torch.allclose(state["a"], before + submitted)
    assert submitted >= 2


def test_two_sessions_from_the_same_weights() -> None:
    state, xs = weights(), samples(5)
    with Session(two_stages(), state) as one, Session(two_stages(), state) as two:
        with torch.no_grad():
            state["b"].neg_()
        for session in (one, two):
            assert session.detached(state) == []
            assert all(
                torch.equal(y, expected(state, x)) for x, (_, (y,)) in zip(xs, run_all(session, xs), strict=True)
            )


def test_killed_worker_is_reported_and_nothing_stays() -> None:
    session = Session(two_stages("time.sleep(sample * 0.5)\ny = aten.mm.default(x, a)"), weights())
    pids = session.pids
    for _ in range(2):
        session.submit(samples(1))
    session.result(timeout=10)
    os.kill(pids[1], signal.SIGKILL)
    # A result may be here before the worker has noted that it waits for the next sample.
    with pytest.raises(WorkerDied, match=r"device 1 \(stages 1\) was killed by SIGKILL while .*sample [01]") as caught:
        session.result(timeout=10)
    assert session.closed
    assert gone(pids)
    with pytest.raises(PipelineClosed, match="SIGKILL") as again:
        session.submit(samples(1))
    assert again.value.__cause__ is caught.value
    session.close()


def test_worker_that_leaves_is_reported_with_its_code() -> None:
    with Session(two_stages("os._exit(3)"), weights()) as session:
        session.submit(samples(1))
        with pytest.raises(WorkerDied, match=r"device 0 .* exited with code 3 while computing sample 0"):
            session.result(timeout=10)


RAISING = (
    "# encoder.norm  (model.py:42)\ny = aten.mm.default(x, b)\n# head  (model.py:50)\nif sample == 2:\n    y = y @ y"
)


@pytest.mark.parametrize("kind", [Session, InlineSession])
def test_stage_that_raises_names_everything(kind: type[Session] | type[InlineSession]) -> None:
    state, xs = weights(), samples(5)
    with kind(two_stages(second=RAISING), state) as session:
        for x in xs[:3]:
            session.submit([x])
            session.wait(timeout=10)
        for x in xs[:2]:
            assert torch.equal(session.result(timeout=10)[1][0], expected_linear(state, x))
        with pytest.raises(StageError) as caught:
            session.result(timeout=10)
        assert not session.closed
        assert session.in_flight == 0
        for number, x in enumerate(xs[3:], start=3):
            assert session.submit([x]) == number, "the pipeline goes on"
            found, (y,) = session.result(timeout=10)
            assert found == number
            assert torch.equal(y, expected_linear(state, x))
    error = caught.value
    assert (error.stage, error.device, error.sample) == (1, 1, 2)
    text = str(pickle.loads(pickle.dumps(error)))
    assert "stage 1 on device 1 raised RuntimeError at sample 2 in layer head  (model.py:50)" in text
    assert "device_1.py:" in text
    assert "y = y @ y" in text
    assert "Traceback" in text


def expected_linear(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x @ state["a"] @ state["b"]


def test_stage_that_hangs() -> None:
    session = Session(two_stages(second="time.sleep(1000)"), weights(), hang_seconds=0.5)
    pids = session.pids
    session.submit(samples(1))
    with pytest.raises(WorkerHung, match=r"device 1 .* while computing sample 0"):
        session.result(timeout=20)
    assert gone(pids)


@pytest.mark.parametrize(
    ("warm", "where"), [(0, "before the first sample|while waiting"), (3, "stopped while waiting for .* 0>1")]
)
def test_a_worker_stopped_while_it_waits_has_hung(warm: int, where: str) -> None:
    session = Session(two_stages(), weights(), hang_seconds=0.4)
    for _ in range(warm):
        session.submit(samples(1))
        session.result(timeout=20)
    pids = session.pids
    while warm and Path(f"/proc/{pids[1]}/stat").read_text().rpartition(") ")[2][0] != "S":
        time.sleep(0.01)  # it goes on a little after its last result before it waits
    os.kill(pids[1], signal.SIGSTOP)
    session.submit(samples(1))
    with pytest.raises(WorkerHung, match=f"device 1 .*({where})"):
        session.result(timeout=20)
    assert gone(pids)


def test_schedule_that_deadlocks_is_an_error() -> None:
    stuck = two_stages()
    source = stuck.modules[1].source
    for line in ("    if start == 0: x_in.post(0)\n", "        x_in.post(sample + 1)\n"):
        assert line in source
        source = source.replace(line, "")
    modules = (stuck.modules[0], type(stuck.modules[1])(1, (1,), source, "device_1.py", ("b",)))
    stuck = type(stuck)(**{**vars(stuck), "modules": modules})
    with Session(stuck, weights(), hang_seconds=0.3) as session:
        session.submit(samples(1))
        with pytest.raises(PipelineError, match=r"deadlock.*device 1.*a message on edge 0>1"):
            session.result(timeout=20)
    with InlineSession(stuck, weights()) as inline:
        inline.submit(samples(1))
        with pytest.raises(PipelineError, match=r"deadlock.*device 1 waits for a message on edge 0>1"):
            inline.result()


@pytest.mark.parametrize(
    ("source", "found"),
    [("import surely_not_a_module\n", "ModuleNotFoundError"), ("def run(:\n", "SyntaxError")],
)
def test_start_up_failure(source: str, found: str) -> None:
    x = torch.zeros(1)
    broken = package(
        [DeviceModule(0, (0,), source, "device_0.py", ())],
        [edge(HOST, 0, {"x": x}), edge(0, HOST, {"y": x})],
        [("x", x)],
        [OutputRef("value", "y")],
    )
    with pytest.raises(PipelineError, match=f"device 0 .* could not start: {found}"):
        Session(broken, {})


def test_abandoned_session_ends_its_workers() -> None:
    session = Session(two_stages(), weights())
    pids = session.pids
    session.submit(samples(1))
    del session
    gc.collect()
    assert gone(pids)


def test_after_the_crew_was_stopped_as_at_exit_nothing_touches_its_descriptors() -> None:
    session = Session(two_stages(), weights())
    session.submit(samples(1))
    session._crew.stop()
    assert session.closed
    with pytest.raises(PipelineClosed):
        session.result()
    session.nudge()
    session.close()


def test_close_ends_waits_of_other_threads_may_be_repeated_and_is_final() -> None:
    session = Session(two_stages(), weights())
    pids = session.pids
    caught: list[BaseException] = []

    def take() -> None:
        try:
            session.result(timeout=20)
        except PipelineClosed as error:
            caught.append(error)

    taker = threading.Thread(target=take)
    taker.start()
    time.sleep(0.1)
    session.close()
    taker.join(5)
    assert len(caught) == 1
    session.close()
    assert gone(pids)
    for use in (lambda: session.submit(samples(1)), session.poll, session.result, session.wait):
        with pytest.raises(PipelineClosed, match="is closed"):
            use()


def test_missing_weights() -> None:
    with pytest.raises(PipecompileError, match=r"lack \['b'\]"):
        Session(two_stages(), {"a": torch.zeros(8, 6)})


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_leaves_the_workers_alone(shared: Session) -> None:
    xs = samples(3)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            shared.submit(xs[:1])
        except PipelineClosed:
            shared.close()
            shared._finalizer()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(run_all(shared, xs[:1])[0][1][0], expected(weights(), xs[0]))


SCRIPT = """
import os, sys, time
sys.path.insert(0, {tests!r})
from runtime_packages import two_stages, weights, samples
from pipecompile.runtime.session import Session
session = Session(two_stages(second={second!r}), weights())
session.submit(samples(1))
print(*session.pids, flush=True)
{last}
"""


def start_script(last: str, second: str = "y = torch.relu(x @ b)") -> tuple[subprocess.Popen[str], tuple[int, ...]]:
    source = SCRIPT.format(tests=str(Path(__file__).parent), second=second, last=textwrap.dedent(last))
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, tuple(int(word) for word in process.stdout.readline().split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "last", ["time.sleep(60)", "if os.fork() == 0:\n    os.close(1)\n    time.sleep(3)\ntime.sleep(60)"]
)
def test_workers_follow_a_killed_parent_even_when_computing(last: str) -> None:
    process, pids = start_script(last, second="while True: pass")
    with process:
        assert all(alive(pid) for pid in pids)
        assert len(pids) == 2
        process.kill()
    assert gone(pids, 2.5)


@pytest.mark.slow
def test_workers_follow_a_parent_that_just_ends() -> None:
    process, pids = start_script("")
    with process:
        assert process.wait(30) == 0
    assert gone(pids)


def test_interrupt_reaches_the_caller_only(shared: Session) -> None:
    # A test run started in the background inherits an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        shared.result(timeout=10)
    timer.join()
    signal.signal(signal.SIGINT, before)
    assert torch.equal(run_all(shared, samples(1))[0][1][0], expected(weights(), samples(1)[0]))


def test_idle_session_uses_no_processor_time(shared: Session) -> None:
    run_all(shared, samples(3))
    before = [*map(_processor_ticks, shared.pids), time.process_time()]
    with pytest.raises(ResultTimeout):
        shared.result(timeout=1.0)
    spent = [*map(_processor_ticks, shared.pids), time.process_time()]
    assert [b - a for a, b in zip(before[:-1], spent[:-1], strict=True)] == [0, 0]
    assert spent[-1] - before[-1] < 0.1


def test_devices_do_not_sleep_while_a_call_is_awaited_and_do_afterwards(shared: Session) -> None:
    run_all(shared, samples(1))
    with shared.awake():  # no sample comes: the devices watch for it until their patience is at an end
        before = [*map(_processor_ticks, shared.pids)]
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            with shared.awake():
                time.sleep(0.001)
        spent = [b - a for a, b in zip(before, map(_processor_ticks, shared.pids), strict=True)]
    assert spent[-1] >= 2  # of 50 ticks, less what others take; the first device is woken by the sample itself
    time.sleep(0.05)
    before = [*map(_processor_ticks, shared.pids)]
    time.sleep(0.5)
    assert [*map(_processor_ticks, shared.pids)] == before


def test_being_roused_is_not_a_message(shared: Session) -> None:
    for x in samples(20):
        with shared.awake(), shared.awake():
            assert shared.submit([x]) is not None
            assert torch.equal(shared.result(timeout=10)[1][0], expected(weights(), x))


def _processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_throttled_edge_delays_but_does_not_change_results() -> None:
    state, xs = weights(), samples(6)
    with Session(two_stages(), state, throttle={"0>1": Link(0.05, 1e9), "1>host": Link(0.02, 1e9)}) as session:
        results = run_all(session, xs)
        finishes, latencies = session.timeline().finishes, session.timeline().latencies
    assert all(torch.equal(y, expected(state, x)) for x, (_, (y,)) in zip(xs, results, strict=True))
    # The slower edge carries one message at a time; each sample then pays the other, too. Later is possible.
    assert latencies[0] >= 0.07
    assert all(at >= 0.05 * (k + 1) + 0.02 - 0.001 for k, at in enumerate(finishes))


def test_caller_settings_reach_the_workers_but_inference_mode_stays_outside() -> None:
    state, xs = weights(), samples(3)
    body = "assert torch.get_default_dtype() is torch.float64\nassert torch.get_num_threads() == 1\ny = x @ a"
    built = two_stages(body)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            session = Session(built, state)
            run_all(session, xs)
    finally:
        torch.set_default_dtype(torch.float32)
    with session:
        assert torch.equal(run_all(session, xs)[0][1][0], expected(state, xs[0]))
