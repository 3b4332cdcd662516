"""stream(): order, failures of samples and sources, live sources, records, early ends."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile import Counts, InputError, Overloaded, Sample, StageError
from streams.stream_parts import Stateful, balanced, compiled, inputs, mlp, outputs, same


class Lookups(nn.Module):
    """Raises at ids outside its tables, at the front or at the back; writes to a buffer on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.register_buffer("seen", torch.zeros(4, 16))
        self.front = nn.Embedding(10, 16)
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.back = nn.Embedding(10, 16)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = self.middle(self.front(a))
        self.seen.add_(x)
        # A chain: what a stage before the one that raises has written is what eager has written, too.
        return self.back(b + (self.seen[:, 0] * 0).long()) + self.seen


def ids(count: int, bad_front: tuple[int, ...] = (), bad_back: tuple[int, ...] = ()) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(1)
    made = [tuple(torch.randint(10, (4,), generator=generator) for _ in range(2)) for _ in range(count)]
    for k, (a, b) in enumerate(made):
        a[1] = 99 if k in bad_front else a[1]
        b[2] = 99 if k in bad_back else b[2]
    return made  # type: ignore[return-value]


def eager(model: nn.Module, xs: list[tuple[Any, Any]]) -> list[Any]:
    """Result or None where eager raises; buffers go on as eager leaves them."""
    found: list[Any] = []
    for x in xs:
        try:
            with torch.no_grad():
                found.append(model(*x))
        except IndexError:
            found.append(None)
    return found


@pytest.fixture(scope="module", params=["inline", "process"])
def lookups(request: pytest.FixtureRequest) -> Iterator[pipecompile.InferencePipeline]:
    with compiled(Lookups(), *ids(1)[0], executor=request.param) as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("front", "back"),
    [((0,), ()), ((), (5,)), ((19,), ()), ((3, 4, 5), ()), ((), (3, 4, 5)), ((7,), (7,)), ((2, 6), (3, 6, 19))],
)
def test_a_sample_that_raises_is_named_and_the_next_goes_on(
    lookups: pipecompile.InferencePipeline, front: tuple[int, ...], back: tuple[int, ...]
) -> None:
    lookups.reset_state()
    xs, reference, before = ids(20, front, back), Lookups().eval(), lookups.counts
    want = eager(reference, xs)
    stream = lookups.stream(xs)
    for k, expected in enumerate(want):
        if expected is None:
            with pytest.raises(StageError, match=f"at sample {k} in layer .*test_pulled.py:") as caught:
                next(stream)
            assert caught.value.sample == k
            assert caught.value.raised == "IndexError"
            assert ("p_front_weight" if k in front else "p_back_weight") in caught.value.line
            assert caught.value.stage == (0 if k in front else 1)
        else:
            assert torch.equal(next(stream), expected)
    with pytest.raises(StopIteration):
        next(stream)
    assert torch.equal(dict(lookups.named_buffers())["seen"], reference.seen)
    after = lookups.counts
    assert balanced(after)
    assert after.in_flight == 0
    assert after.failed - before.failed == len({*front, *back})
    good = ids(1)[0]
    assert torch.equal(lookups(*good), eager(reference, [good])[0])


def test_a_call_that_raises_leaves_the_pipeline_usable(lookups: pipecompile.InferencePipeline) -> None:
    lookups.reset_state()
    reference, bad, good = Lookups().eval(), ids(1, (0,))[0], ids(2)[1]
    with pytest.raises(StageError, match="IndexError"):
        lookups(*bad)
    assert eager(reference, [bad]) == [None]
    assert torch.equal(lookups(*good), eager(reference, [good])[0])


def test_an_error_that_is_kept_does_not_keep_the_stream_whose_loop_it_ended(
    lookups: pipecompile.InferencePipeline,
) -> None:
    bad, good = ids(1, (0,))[0], ids(2)[1]

    def loop() -> None:
        for _ in lookups.stream([good, bad, good]):
            pass

    with pytest.raises(StageError, match="sample 1") as kept:
        loop()
    assert torch.is_tensor(lookups(*good))
    assert kept.tb is not None


def test_failed_samples_can_be_skipped_or_returned(lookups: pipecompile.InferencePipeline) -> None:
    lookups.reset_state()
    xs = ids(9, (2,), (5, 8))
    want = eager(Lookups().eval(), xs)
    assert same(lookups.stream(xs, on_error="skip"), [y for y in want if y is not None])
    lookups.reset_state()
    found = list(lookups.stream(xs, on_error="return"))
    assert [k for k, y in enumerate(found) if isinstance(y, StageError)] == [2, 5, 8]
    assert same([y for y in found if torch.is_tensor(y)], [y for y in want if y is not None])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (torch.zeros(3, 8), "sample 2: input 'input_1' has shape 3x8, compiled for 2x8"),
        (torch.zeros(2, 8, dtype=torch.float64), "sample 2: input 'input_1' has dtype torch.float64"),
        (torch.zeros(2, 8, device="meta"), "sample 2: input 'input_1' is on meta"),
        ((torch.zeros(2, 8), torch.zeros(2, 8)), "sample 2: .* in this call 2 positional arguments are given"),
        ([], "sample 2: .* in this call input is missing"),
        ("frame", "sample 2: .* another structure"),
    ],
)
def test_an_item_that_does_not_fit_is_named_and_the_next_goes_on(bad: Any, words: str) -> None:
    model, xs = mlp(), inputs(5)
    want = outputs(model, xs)
    items = [*xs[:2], bad, *xs[3:]]
    with compiled(model, xs[0]) as pipe:
        stream = pipe.stream(items)
        assert same([next(stream), next(stream)], want[:2])
        with pytest.raises(InputError, match=words):
            next(stream)
        assert same(stream, want[3:])
        assert pipe.counts == Counts(5, 4, 0, 1, 0)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(xs)), batch_size=2)
        assert same(pipe.stream(loader), want)


@pytest.mark.parametrize("policy", ["block", "drop_newest"])
def test_a_source_that_raises_is_heard_after_the_results_of_all_it_gave(policy: Any) -> None:
    model, xs = mlp(), inputs(6)

    def source() -> Iterator[torch.Tensor]:
        yield from xs
        raise OSError("the camera is gone")

    with compiled(model, xs[0]) as pipe:
        stream = pipe.stream(source(), on_overload=policy, max_in_flight=6)
        assert same([next(stream) for _ in xs], outputs(model, xs))
        with pytest.raises(OSError, match="camera"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)
        assert pipe.counts == Counts(6, 6, 0, 0, 0)
        assert same(pipe.stream(xs), outputs(model, xs))


def test_a_slow_source_does_not_hold_back_finished_results() -> None:
    model, xs = mlp(), inputs(4)
    with compiled(model, xs[0]) as pipe:
        given: list[int] = []

        def source() -> Iterator[torch.Tensor]:
            for k, x in enumerate(xs):
                time.sleep(0.01)
                given.append(k)
                yield x

        seen = [len(given) for _ in pipe.stream(source())]
    # Each result is there before the sample after the next is asked for, not only when the rings are full.
    assert seen == [1, 2, 3, 4]


def test_records_tell_what_happened() -> None:
    model, xs = mlp(), inputs(8)
    with compiled(model, xs[0]) as pipe:
        items = [Sample(x, pts=k / 25) for k, x in enumerate(xs)]
        found = list(pipe.stream(items, records=True))
    assert same([result.value for result in found], outputs(model, xs))
    for k, record in enumerate(result.record for result in found):
        assert (record.sequence, record.pts, record.dropped) == (k, k / 25, 0)
        assert record.offered <= record.entered <= record.left
        assert len(record.stages) == 2
        assert all(0 < seconds <= record.latency for seconds in record.stages)


def test_samples_too_late_to_enter_are_dropped() -> None:
    model, xs = mlp(), inputs(6)
    with compiled(model, xs[0]) as pipe:
        assert list(pipe.stream(xs, deadline=0.0, on_overload="drop_oldest")) == []
        assert pipe.counts == Counts(6, 0, 6, 0, 0)
        assert same(pipe.stream(xs, deadline=60.0), outputs(model, xs))


class Live:
    """A source that runs at its own pace: as fast as Python can."""

    live = True

    def __init__(self, xs: list[torch.Tensor], count: int) -> None:
        self.xs, self.count, self.given = xs, count, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.given < self.count:
            self.given += 1
            yield self.xs[(self.given - 1) % len(self.xs)]


class Watcher(threading.Thread):
    """Looks at the account of a pipeline from another thread, all the time."""

    def __init__(self, pipe: pipecompile.InferencePipeline) -> None:
        super().__init__(daemon=True)
        self.pipe, self.stopped, self.looks, self.most = pipe, False, 0, 0
        self.wrong: list[Any] = []

    def run(self) -> None:
        last = Counts()
        while not self.stopped:
            now = self.pipe.counts
            grows = all(
                getattr(now, name) >= getattr(last, name) for name in ("submitted", "delivered", "dropped", "failed")
            )
            if not balanced(now) or not grows or now.in_flight < 0:
                self.wrong.append((last, now))
            last, self.looks, self.most = now, self.looks + 1, max(self.most, now.in_flight)
            time.sleep(0.0002)

    def __enter__(self) -> Watcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True
        self.join()
        assert self.looks > 0
        assert self.wrong == []


@pytest.fixture(scope="module")
def fast() -> Iterator[tuple[pipecompile.InferencePipeline, list[torch.Tensor], list[torch.Tensor]]]:
    """A small model in two processes, inputs and what eager makes of them."""
    model, xs = mlp(), inputs(97)
    with compiled(model, xs[0], executor="process") as pipe:
        yield pipe, xs, outputs(model, xs)


def overload(fast: Any, policy: str, count: int, most: int, **options: Any) -> Counts:
    """A live source far too fast; returns what this run added to the account."""
    pipe, xs, want = fast
    before = pipe.counts
    source = Live(xs, count)
    last = -1
    with Watcher(pipe) as watcher:
        dropped = 0
        for result in pipe.stream(source, on_overload=policy, records=True, **options):
            number = result.record.sequence
            assert number > last
            assert torch.equal(result.value, want[number % len(xs)])
            dropped += result.record.dropped
            last = number
    assert watcher.most <= most
    after = pipe.counts
    assert balanced(after)
    assert after.in_flight == 0
    added = Counts(*(getattr(after, n) - getattr(before, n) for n in ("submitted", "delivered", "dropped", "failed")))
    assert added.submitted == count == source.given
    # Those dropped behind the last result are in no record.
    assert added.dropped == dropped + count - 1 - last
    return added


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "latest", None])
@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_an_overloaded_stream_keeps_order_account_and_bounds(fast: Any, policy: str, count: int) -> None:
    # None: a live source, so the newest. One may wait, one a stage be inside, one be on its way in or out.
    most = 4 if policy in ("latest", None) else 6 + 6 + 2
    options = {} if policy in ("latest", None) else {"max_in_flight": 6}
    added = overload(fast, policy, count, most, **options)
    assert added.dropped > 0
    assert added.delivered > 0


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_block_loses_nothing(fast: Any, count: int) -> None:
    added = overload(fast, "block", count, 8, max_in_flight=6)
    assert added == Counts(count, count, 0, 0, 0)


def test_error_ends_the_stream_after_what_was_accepted(fast: Any) -> None:
    pipe, xs, want = fast
    before = pipe.counts
    stream = pipe.stream(Live(xs, 10_000), on_overload="error", max_in_flight=3)
    found: list[Any] = []
    with pytest.raises(Overloaded, match="was refused: 3 samples wait"):
        found.extend(stream)
    found.extend(stream)
    after = pipe.counts
    assert after.delivered - before.delivered == len(found) >= 3
    assert after.dropped - before.dropped == 1
    assert same(found, (want[k % len(xs)] for k in range(len(found))))


def test_a_slow_consumer_stops_a_file_and_misses_frames_of_a_camera(fast: Any) -> None:
    pipe, xs, want = fast
    source, seen = Live(xs, 200), []
    for _ in pipe.stream(source, on_overload="block", max_in_flight=4):
        seen.append(source.given)
        if len(seen) < 10:
            time.sleep(0.01)
    assert all(given <= k + 6 for k, given in enumerate(seen, start=1)), "it read ahead of its consumer"
    slow = pipe.stream(itertools.chain(Live(xs, 100_000)), on_overload="latest", records=True)
    first = next(slow).record.sequence
    time.sleep(0.3)
    for _ in range(3):
        later = next(slow).record.sequence
    assert later - first > 10, "what it gets after a pause is new"
    slow.close()
    assert same(pipe.stream(xs), want)


def test_an_abandoned_consumer_leaves_a_usable_pipeline_and_no_thread(fast: Any) -> None:
    pipe, xs, want = fast
    before = pipe.counts
    for policy in ("block", "latest"):
        for k, _ in enumerate(pipe.stream(Live(xs, 10**9), on_overload=policy)):
            if k == 5:
                break
        gc.collect()
        assert pipe.counts.in_flight == 0
    assert pipe.counts.dropped > before.dropped
    assert same(pipe.stream(xs), want)
    deadline = time.monotonic() + 10
    while any(t.name == "pipecompile-reader" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name == "pipecompile-reader" for t in threading.enumerate())


def test_a_stream_may_end_in_another_thread_than_it_began(fast: Any) -> None:
    pipe, xs, want = fast
    stream = pipe.stream(xs)
    assert torch.equal(next(stream), want[0])
    rest: list[torch.Tensor] = []
    reader = threading.Thread(target=lambda: rest.extend(stream))
    reader.start()
    reader.join(30)
    assert same(rest, want[1:])


def test_nothing_that_is_no_number_is_changed_and_empty_things_pass(fast: Any) -> None:
    pipe, _, _ = fast
    assert list(pipe.stream([])) == []
    assert list(pipe.stream([], on_overload="latest")) == []
    strange = torch.full((2, 8), float("nan"))
    strange[1] = 1e30
    with torch.no_grad():
        want = mlp()(strange)
    (got,) = pipe.stream([strange])
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_a_stream_is_refused_while_another_runs_but_calls_take_turns(fast: Any) -> None:
    pipe, xs, want = fast
    stream = pipe.stream(xs)
    next(stream)
    with pytest.raises(InputError, match="busy with a stream"):
        next(pipe.stream(xs))
    with pytest.raises(InputError, match="busy with a stream"):
        pipe.submit(xs[0])
    stream.close()
    found: dict[int, list[torch.Tensor]] = {}

    def call(mine: int) -> None:
        found[mine] = [pipe(x) for x in xs[:20]]

    callers = [threading.Thread(target=call, args=(k,)) for k in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(found) == 3
    assert all(same(results, want[:20]) for results in found.values())


def replaced(model: nn.Sequential) -> None:
    state = model.state_dict()
    model.load_state_dict({name: torch.randn_like(value) for name, value in state.items()}, assign=True)


def emptied(model: nn.Sequential) -> None:
    model[0].weight.data = torch.ones(8, 8)


@pytest.mark.parametrize("change", [replaced, emptied])
@pytest.mark.parametrize(("executor", "policy"), [("process", "block"), ("inline", "drop_oldest")])
def test_storage_replaced_in_mid_stream_counts_from_the_next_sample_in(change: Any, executor: Any, policy: Any) -> None:
    model, xs = mlp(), inputs(20)
    asked: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        for i, x in enumerate(xs):
            while policy != "block" and i == 10 and len(asked) < 10:
                time.sleep(0.001)  # read in a thread of its own: the ten before are through when the weights change
            if i == 10:
                change(model)
            yield x

    before = outputs(model, xs)
    with compiled(model, xs[0], executor=executor, on_overload=policy, max_in_flight=10) as pipe:
        got: list[torch.Tensor] = []
        for y in pipe.stream(source()):
            got.append(y)
            asked.append(len(got))
        assert same(got, [*before[:10], *outputs(model, xs)[10:]])
        assert balanced(pipe.counts)


def test_submitted_samples_see_replaced_storage_and_a_weight_that_is_gone_is_named() -> None:
    model, x = mlp(), inputs(1)[0]
    with compiled(model, x) as pipe:
        pipe.submit(x).result(5)
        replaced(model)
        assert torch.equal(pipe.submit(x).result(5), outputs(model, [x])[0])
        del model[0].weight
        with pytest.raises(InputError, match=r"no 0\.weight any more"):
            pipe.submit(x).result(5)


def test_a_stateful_model_under_drops_counts_only_what_entered() -> None:
    torch.manual_seed(0)
    model, xs = Stateful().eval(), inputs(50)
    reference = Stateful().eval()
    reference.load_state_dict(model.state_dict())
    with compiled(model, xs[0]) as pipe:
        found = list(pipe.stream(xs, on_overload="drop_newest", max_in_flight=2, records=True))
    entered = [xs[result.record.sequence] for result in found]
    assert same([result.value for result in found], outputs(reference, entered))
    assert torch.equal(model.mean, reference.mean)
