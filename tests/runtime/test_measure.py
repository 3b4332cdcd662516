from __future__ import annotations

import gc
import os

import pytest
import torch

from pipecompile.errors import PipelineError
from pipecompile.ir.measure import Job
from pipecompile.runtime import nursery
from pipecompile.runtime.measure import CpuMeasure

MODEL = """
import time, torch
def model(clock, weight, counter, x):
    assert not torch.is_grad_enabled() and torch.get_num_threads() == 1
    time.sleep(0.002)
    clock(0)
    counter.add_(1)
    x.mul_(0)
    clock(1)
    time.sleep(0.006)
    clock(2)
    return x @ weight
def stage_0(counter):
    counter.add_(1)
    time.sleep(0.003)
def quick():
    pass
def counts(number):
    assert not torch.is_grad_enabled() and torch.get_num_threads() == 1
    sum(range(10_000 * number))
def cached(cache, at):
    cache[at] = 1.0
    at.add_(1)
def model_cached(clock, cache, at):
    cached(cache, at)
    clock(0)
def broken():
    raise ValueError("as asked")
"""


def arguments() -> list[torch.Tensor]:
    return [torch.ones(2, 2, requires_grad=True), torch.zeros(()), torch.ones(2, 2)]


def test_every_run_finds_the_state_as_it_was() -> None:
    """Else a cache of two entries would be full after two runs."""
    cache, at = torch.zeros(2), torch.zeros((), dtype=torch.int64)
    source = MODEL.replace("def model(", "def unused(").replace("model_cached", "model")
    assert CpuMeasure().layers(source, [cache, at], 1, 0.01)[2] >= 3
    job = Job(MODEL, "cached", [cache, at])
    assert CpuMeasure().functions([job], 0.01)[0] > 0.0
    assert CpuMeasure().slowdowns([job], [None], 0.01)[0] >= 1.0
    assert (int(at), cache.tolist()) == (0, [0.0, 0.0])


def test_layers_are_timed_in_place_and_arguments_left_alone() -> None:
    values = arguments()
    threads, affinity = torch.get_num_threads(), os.sched_getaffinity(0)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    layers, whole, repeats = CpuMeasure().layers(MODEL, values, 3, 0.1)
    assert len(layers) == 3
    assert repeats >= 3
    assert layers[0] >= 0.002
    assert layers[2] >= 0.006
    assert layers[1] < layers[0] < layers[2]
    assert whole >= 0.008
    assert values[1] == 0
    assert torch.equal(values[2], torch.ones(2, 2))
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, affinity)
    assert gc.isenabled()
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() is fastpath


def test_functions_are_timed_in_turns() -> None:
    counter = torch.zeros(())
    quick, slow = CpuMeasure().functions([Job(MODEL, "quick", []), Job(MODEL, "stage_0", [counter])], 0.02)
    assert quick < slow
    assert slow >= 0.003
    assert counter == 0


def test_jobs_that_run_at_once_leave_nothing_and_arguments_alone() -> None:
    counter, broken = torch.zeros(()), Job(MODEL, "broken", [])
    job = Job(MODEL, "stage_0", [counter])
    nursery.prepare()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    factors = CpuMeasure().slowdowns([job, job, Job(MODEL, "counts", [2])], [0, 0, None], 0.02)
    assert len(factors) == 3
    assert all(1 <= factor < 1000 for factor in factors)
    assert counter == 0
    with pytest.raises(PipelineError, match=r"could not be run in a worker.*ValueError: as asked"):
        CpuMeasure().slowdowns([job, broken], [0, 0], 0.02)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_settings_come_back_after_an_error() -> None:
    threads, affinity = torch.get_num_threads(), os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="as asked"):
        CpuMeasure().functions([Job(MODEL, "broken", [])], 0.01)
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, affinity)
    assert gc.isenabled()


def test_link_is_measured_and_leaves_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    link = CpuMeasure().link()
    assert 0 < link.latency < 0.1
    assert 1e6 < link.bandwidth < 1e13
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
