from __future__ import annotations

import gc
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipecompile.errors import InputError, PipelineError
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.program import Edge
from pipecompile.runtime.channels.cells import disjoint
from pipecompile.runtime.channels.local import LocalEdge
from pipecompile.runtime.channels.ring import RingReceiver, RingSender
from pipecompile.runtime.channels.shared_memory import SharedEdge

Ends = tuple[RingSender, RingReceiver]


@contextmanager
def ends(
    kind: str, specs: dict[str, TensorSpec], slots: int = 2, sizes: dict[str, int] | None = None, throttle: Any = None
) -> Iterator[Ends]:
    edge = Edge(0, 1, tuple(specs), tuple(specs.values()), slots - 1, slots)
    if kind == "local":
        local = LocalEdge(edge, sizes or {})
        yield local.sender(), local.receiver(throttle=throttle)
        return
    shared = SharedEdge.create(edge, sizes or {})
    try:
        yield shared.sender(), shared.receiver(throttle=throttle)
    finally:
        for fd in shared.fds:
            os.close(fd)


both = pytest.mark.parametrize("kind", ["local", "shared"])


def placed(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, start: int) -> torch.Tensor:
    """A tensor of that layout with distinct elements, ``start`` elements into its storage."""
    extent = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    data = torch.arange(start + extent) % 251
    if dtype.is_complex:
        data = torch.complex(data.double(), -data.double())
    return data.to(dtype).as_strided(shape, stride, start)


@st.composite
def layouts(draw: st.DrawFn) -> torch.Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    order = draw(st.permutations(range(len(shape))))
    stride, step = [0] * len(shape), draw(st.integers(1, 2))
    for dim in order:
        stride[dim] = step * draw(st.sampled_from([1, 1, 1, 2]))
        step = max(step, stride[dim] * max(1, shape[dim]))
        if draw(st.integers(0, 9)) == 0:
            stride[dim] = 0
    names = ["float32", "float64", "bfloat16", "float16", "int8", "uint8", "int64", "bool", "complex64", "complex128"]
    dtype = getattr(torch, draw(st.sampled_from(names)))
    return placed(shape, tuple(stride), dtype, draw(st.integers(0, 7)))


@given(layouts(), st.booleans(), st.sampled_from(["local", "shared"]))
@settings(max_examples=150, deadline=None)
def test_every_layout_survives(value: torch.Tensor, dynamic: bool, kind: str) -> None:
    spec = TensorSpec.of(value)
    if dynamic:
        spec = TensorSpec(spec.shape, spec.dtype, spec.stride, dynamic=True, limit=f"{spec.nbytes}*s")
    with ends(kind, {"v": spec}, sizes={"s": 1}) as (sender, receiver):
        for number in range(3):
            receiver.post(number)
            sender.take()
            sender.put(number, value)
            message = receiver.take()
            assert message is not None
            (got,) = message
            assert got.shape == value.shape
            assert got.stride() == value.stride()
            assert got.dtype == value.dtype
            assert torch.equal(got, value)
            if value.numel():
                assert got.data_ptr() % 64 == value.data_ptr() % 64
                assert got.data_ptr() != value.data_ptr()


@given(layouts(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_owned_results_keep_strides_and_outlive_the_slot(value: torch.Tensor, dynamic: bool) -> None:
    spec = TensorSpec.of(value)
    if dynamic:
        spec = TensorSpec(spec.shape, spec.dtype, spec.stride, dynamic=True, limit=str(spec.nbytes))
    with ends("local", {"v": spec}, slots=1) as (sender, receiver):
        owned: list[torch.Tensor] = []
        for number, sent in enumerate((value, torch.zeros_like(value))):
            receiver.post(number)
            sender.take()
            if sent.stride() == value.stride():
                sender.put(number, sent)
                message = receiver.own()
                assert message is not None
                owned.append(message[0])
        assert torch.equal(owned[0], value)
        assert owned[0].stride() == value.stride()


@both
def test_numbers_and_an_empty_message(kind: str) -> None:
    specs = {"i": TensorSpec.of(3), "f": TensorSpec.of(0.5), "b": TensorSpec.of(True)}
    with ends(kind, specs) as (sender, receiver):
        for number, values in enumerate([(-(2**63), math.inf, True), (0, -0.25, False)]):
            receiver.post(number)
            sender.take()
            sender.put(number, *values)
            got = receiver.take()
            assert got == values
            assert [type(v) for v in got or ()] == [int, float, bool]
        for wrong in ((0.5, 0.5, True), (2**63, 0.5, True), (1, "x", True), (1, torch.ones(()), True)):
            with pytest.raises(InputError, match="compiled for a Python"):
                sender.check(wrong)
    with ends(kind, {}) as (sender, receiver):
        receiver.post(0)
        sender.take()
        sender.put(0)
        assert receiver.take() == ()


@both
def test_conjugated_and_negated_values_are_resolved(kind: str) -> None:
    value = torch.complex(torch.arange(6.0), torch.ones(6)).reshape(2, 3)
    with ends(kind, {"c": TensorSpec.of(value), "n": TensorSpec.of(value.imag)}) as (sender, receiver):
        receiver.post(0)
        sender.take()
        sender.put(0, value.conj(), value.conj().imag)
        c, n = receiver.take() or ()
        assert not c.is_conj()
        assert torch.equal(c, value.conj().resolve_conj())
        assert torch.equal(n, -value.imag)


@both
def test_mismatch_names_the_value_and_leaves_the_ring_usable(kind: str) -> None:
    good = torch.arange(6.0).reshape(2, 3)
    wide = torch.ones(1, 3).expand(2, 3)
    with ends(kind, {"h": TensorSpec.of(good), "e": TensorSpec.of(wide)}) as (sender, receiver):
        receiver.post(0)
        sender.take()
        for wrong in (torch.ones(1, 3), torch.ones(2, 3, dtype=torch.float64), torch.ones(()), 3, None):
            with pytest.raises(InputError, match="'h'"):
                sender.put(0, wrong, wide)
        with pytest.raises(InputError, match=r"'e'.*share memory"):
            sender.put(0, good, good)
        assert not receiver.ready()
        sender.put(0, good.t().contiguous().t(), wide)
        got = receiver.take() or ()
        assert torch.equal(got[0], good)
        assert got[1].stride() == wide.stride() == (0, 1)


@both
def test_dynamic_values_must_fit(kind: str) -> None:
    spec = TensorSpec((2, 3), "float32", (3, 1), dynamic=True, limit="12*n + 4")
    with ends(kind, {"d": spec}, sizes={"n": 4}) as (sender, receiver):
        receiver.post(0)
        sender.take()
        with pytest.raises(InputError, match=r"'d'.*larger sizes"):
            sender.put(0, torch.zeros(50, 3))
        with pytest.raises(InputError, match=r"'d'.*2 dimensions"):
            sender.put(0, torch.zeros(3))
        with pytest.raises(InputError, match=r"'d'.*float64"):
            sender.put(0, torch.zeros(2, 3, dtype=torch.float64))
        sender.put(0, torch.ones(4, 3))
        assert torch.equal((receiver.take() or ())[0], torch.ones(4, 3))


@both
def test_credits_and_order(kind: str) -> None:
    x = torch.zeros(2)
    with ends(kind, {"x": TensorSpec.of(x)}) as (sender, receiver):
        assert not sender.ready()
        with pytest.raises(PipelineError, match="not posted"):
            sender.put(0, x)
        with pytest.raises(PipelineError, match="posted when 0 was due"):
            receiver.post(1)
        receiver.post(0)
        receiver.post(1)
        with pytest.raises(PipelineError, match="2 slots"):
            receiver.post(2)
        assert sender.ready()
        assert not receiver.ready()
        with pytest.raises(PipelineError, match="put when 0 was due"):
            sender.put(1, x)
        sender.put(0, x + 1)
        sender.put(1, x + 2)
        with pytest.raises(PipelineError, match="not posted"):
            sender.put(2, x)
        assert receiver.ready()
        assert (receiver.take() or ())[0][0] == 1
        receiver.post(2)
        assert (receiver.take() or ())[0][0] == 2
        sender.take()
        sender.end()
        assert receiver.take() is None
        with pytest.raises(PipelineError, match="after the end"):
            receiver.take()


def test_a_message_from_the_wrong_turn_is_noticed() -> None:
    x = torch.zeros(2)
    with ends("local", {"x": TensorSpec.of(x)}) as (sender, receiver):
        receiver.post(0)
        sender.take()
        sender.sample = 2
        sender.put(2, x)
        with pytest.raises(PipelineError, match="message 0 was due, but its slot holds 2"):
            receiver.take()


def test_shared_ends_block_until_signalled() -> None:
    x = torch.arange(3)
    with ends("shared", {"x": TensorSpec.of(x)}) as (sender, receiver):

        def produce() -> None:
            for number in range(200):
                sender.take()
                sender.put(number, x + number)

        producer = threading.Thread(target=produce)
        receiver.post(0)
        producer.start()
        for number in range(200):
            receiver.post(number + 1)
            assert torch.equal((receiver.take() or ())[0], x + number)
        producer.join(10)


@both
def test_throttle_is_latency_plus_bytes_one_message_at_a_time(kind: str) -> None:
    value = torch.zeros(1000, dtype=torch.uint8)
    link = Link(latency=0.03, bandwidth=1000 / 0.02)
    with ends(kind, {"v": TensorSpec.of(value)}, throttle=link) as (sender, receiver):
        receiver.post(0)
        receiver.post(1)
        start = time.monotonic()
        for number in range(2):
            sender.take()
            sender.put(number, value)
        receiver.refill()
        assert receiver.delay() <= 0.05
        receiver.take()
        assert time.monotonic() - start >= 0.05
        receiver.post(2)
        receiver.take()
        assert time.monotonic() - start >= 0.1
        sender.take()
        sender.put(2, value)
        receiver.take()
        assert time.monotonic() - start >= 0.15
        receiver.post(3)
        sender.take()
        sender.end()
        assert receiver.ready()
        assert receiver.take() is None


def test_throttled_message_is_not_ready_before_its_time() -> None:
    with ends("local", {}, throttle=Link(latency=1000.0)) as (sender, receiver):
        receiver.post(0)
        sender.take()
        sender.put(0)
        assert not receiver.ready()
        assert receiver.available
        assert 0 < receiver.delay() <= 1000


def test_slot_is_ready_only_after_it_was_posted() -> None:
    link = Link(latency=0.04, bandwidth=math.inf)
    with ends("local", {}, throttle=link) as (sender, receiver):
        receiver.post(0)
        posted = time.monotonic()
        sender.take()
        sender.put(0)
        receiver.take()
        assert time.monotonic() - posted >= 0.039


def test_ends_made_in_inference_mode_work_outside() -> None:
    x = torch.ones(3)
    with torch.inference_mode():
        edge = LocalEdge(Edge(0, 1, ("x",), (TensorSpec.of(x),), 0, 1), {})
    sender, receiver = edge.sender(), edge.receiver()
    receiver.post(0)
    sender.take()
    sender.put(0, x)
    assert (receiver.take() or ())[0].mul_(2).sum() == 6


def test_ends_leave_no_descriptors() -> None:
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with ends("shared", {"x": TensorSpec.of(torch.zeros(5))}) as pair:
        assert len(os.listdir("/proc/self/fd")) > before
    del pair
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=3))
def test_disjoint_never_claims_too_much(dims: list[tuple[int, int]]) -> None:
    shape, stride = [d for d, _ in dims], [s for _, s in dims]
    addresses = [0]
    for size, step in dims:
        addresses = [a + i * step for a in addresses for i in range(size)]
    if disjoint(shape, stride):
        assert len(set(addresses)) == len(addresses)
    if len(dims) == 1 and len(set(addresses)) == len(addresses):
        assert disjoint(shape, stride)
