"""Several plans share the seconds of ``time_limit``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from pipecompile.clusters import make_cluster
from pipecompile.passes.plan_step import PlanStep
from pipecompile.pipelines import search_time
from pipecompile.pipelines.search_time import LEAST_SECONDS, SearchTime
from pipecompile.pipelines.train_driver import compile_training


def test_what_one_plan_leaves_is_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(search_time.time, "monotonic", lambda: now[0])
    left, given = SearchTime(12.0, 3), list[float]()
    for seconds in (0.0, 5.0, 100.0, 0.0):
        given.append(left.share())
        with left.running():
            now[0] += seconds
    assert given == [2.0, 3.0, 3.5, LEAST_SECONDS]
    assert SearchTime(0.1, 20).share() == 0.1


def test_all_schedules_together_search_for_about_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    apply = PlanStep.apply

    def noted(self: PlanStep, *arguments: Any) -> Any:
        limits.append(self.time_limit)
        return apply(self, *arguments)

    monkeypatch.setattr(PlanStep, "apply", noted)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    with compile_training(
        model, (torch.randn(8, 4),), {}, make_cluster(2), loss_fn=nn.MSELoss(),
        optimizer=partial(torch.optim.SGD, lr=0.1), executor="inline", profile_seconds=0.02, time_limit=24.0,
    ) as pipe:  # fmt: skip
        assert pipe.plan.stages
    assert len(limits) >= 6
    assert limits[0] == 2.0  # of six plans, each searched for twice
    assert max(limits) <= 12.0
