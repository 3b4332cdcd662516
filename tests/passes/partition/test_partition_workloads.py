"""The field's own workloads: known optima reached and proved, experts' splits judged as published."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.baselines import block_partition, equal_cost, equal_count, greedy
from bench.workloads import expert, pipedream, piper, throughput
from pipecompile.errors import PlanError
from pipecompile.passes.partition import Placement, judge, solve

HERE = Path(__file__).parent / "workloads"
DATA = Path(os.environ.get("PIPECOMPILE_WORKLOADS", Path(__file__).resolve().parents[4] / "shared/partition-workloads"))

needs_data = pytest.mark.skipif(
    not (DATA / "expected.json").exists(),
    reason=f"the workloads are not beside the checkout ({DATA}): set PIPECOMPILE_WORKLOADS to their folder",
)


def expected() -> dict[str, Any]:
    found = json.loads((DATA / "expected.json").read_text()) if (DATA / "expected.json").exists() else {}
    return {name: facts for name, facts in found.items() if not name.startswith("_")}


def test_a_vendored_workload_and_its_experts() -> None:
    workload = throughput(HERE / "bert24_training.json")
    assert workload.problem.layers == 32
    solution = solve(workload.problem)
    assert solution.objective == pytest.approx(41.7458, rel=1e-5)
    assert solution.gap <= 1e-4
    split = expert(HERE / "bert24_training_expert.json", workload)
    assert split is not None
    verdict = judge(workload.problem, Placement(split, tuple((d,) for d in range(6))))
    assert verdict.slowest == pytest.approx(49.4049, rel=1e-5)
    one = judge(workload.problem, Placement((0,) * 32, ((0,),)))
    assert one.slowest == pytest.approx(217.813, rel=1e-5)


def check(name: str, cpus: int) -> None:
    facts = expected()[name]
    solution = solve(throughput(DATA / "throughput-inputs" / f"{name}.json", cpus=cpus).problem, time_limit=60.0)
    assert solution.objective == pytest.approx(facts[f"l{cpus}"], rel=1e-4)
    assert solution.gap <= 1.1e-4


@needs_data
@pytest.mark.parametrize("name", [name for name in expected() if "resnet50" in name] or ["absent"])
def test_known_optima_are_proved(name: str) -> None:
    check(name, 0)


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("cpus", [0, 1])
@pytest.mark.parametrize("name", list(expected()) or ["absent"])
def test_all_known_optima_are_proved(name: str, cpus: int) -> None:
    check(name, cpus)


@needs_data
def test_experts_and_single_devices_are_judged_as_published() -> None:
    for name, facts in expected().items():
        workload = throughput(DATA / "throughput-inputs" / f"{name}.json")
        alone = judge(workload.problem, Placement((0,) * workload.problem.layers, ((0,),)))
        assert alone.slowest == pytest.approx(facts["one_device"], rel=1e-5)
        if "expert" in facts:
            file = DATA / "human-experts" / f"{Path(name).name}_expert.json"
            file = file if file.exists() else Path(str(file).replace("training", "inference"))
            split = expert(file, workload)
            assert split is not None
            verdict = judge(workload.problem, Placement(split, tuple((d,) for d in range(max(split) + 1))))
            assert verdict.slowest == pytest.approx(facts["expert"], rel=1e-5)


@pytest.mark.slow
@needs_data
def test_nasnet_large_on_eight_devices() -> None:
    problem = pipedream(DATA / "pipedream-profiles" / "image_classification__nasnetalarge.graph.txt", 8)
    assert problem.layers == 1251
    solution = solve(problem, time_limit=20.0)
    assert solution.objective <= 89.3
    # How much of the time the solver had depends on what else runs; the bound of even shares needs none.
    assert 0 < solution.gap < 0.05


@needs_data
def test_piper_plans_with_replicas_are_never_worse() -> None:
    problem = piper(DATA / "piper-inputs" / "bert32a100.json", 4)
    both = solve(problem)
    assert problem.check(both.placement) == ""
    assert both.verdict.excess == ()
    assert len({device for stage in both.placement.devices for device in stage}) == 4


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "x.graph.txt").write_text("node1 -- Input0 -- forward_compute_time=quick\n")
    with pytest.raises(PlanError, match=r"x\.graph\.txt, line 1: not a node"):
        pipedream(tmp_path / "x.graph.txt", 2)


@pytest.mark.parametrize("method", [equal_count, equal_cost, greedy, block_partition])
def test_simple_methods_fill_every_block(method: Any) -> None:
    for costs, blocks in (([1.0, 5.0, 1.0, 1.0], 4), ([3.0] * 10, 3), ([9.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2)):
        sizes = method(costs, blocks)
        assert len(sizes) == blocks
        assert sum(sizes) == len(costs)
        assert min(sizes) >= 1


def test_block_partition_ends_within_one_of_balance() -> None:
    costs = [float((7 * i) % 5 + 1) for i in range(30)]
    sizes = block_partition(costs, 4)
    ends = [sum(sizes[:i]) for i in range(5)]
    scaled = [(cost - 1) / 4 for cost in costs]
    sums = [sum(scaled[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    assert max(sums) <= min(sums) + 1
