"""A model whose embedding and head share a weight is cut as well as one in which they do not."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.passes.partition import Partition, problem_of
from pipecompile.passes.plan_step import PlanStep
from pipecompile.passes.trace import Trace


@cache
def traced(tied: bool) -> ModelGraph:
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, n_positions=32, vocab_size=100, use_cache=False, tie_word_embeddings=tied
    )
    model = GPT2LMHeadModel(config).eval()
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    return Trace().apply(model, (torch.zeros(1, 16, dtype=torch.long),), {}).graph


def plan(graph: ModelGraph, stages: int, schedule: str = "") -> Plan:
    """Every operator costs as much, the head as much as a block. With a ``schedule``: of a training step."""
    seconds = tuple(1.5 if "lm_head" in layer.name else 0.1 for layer in graph.layers)
    profile = Profile(seconds, {name: 1000 for name in graph.values}, Link(1e-4, 1e9), sum(seconds))
    devices = tuple(Device(f"cpu:{i}") for i in range(stages))
    planner = PlanStep(schedule, micro_batches=4) if schedule else Partition(stages)
    return planner.apply(graph, profile, Cluster(devices, profile.link))


@pytest.mark.parametrize("schedule", ["", "1f1b"], ids=["infer", "train"])
@pytest.mark.parametrize("stages", [2, 3])
def test_a_tied_model_keeps_the_balance_of_the_untied(stages: int, schedule: str) -> None:
    tied, untied = traced(True), traced(False)
    both, apart = plan(tied, stages, schedule), plan(untied, stages, schedule)
    assert both.balance >= 0.95 * apart.balance
    # The shared weight is one tensor with two users, paid by each stage that uses it.
    profile = Profile((1.0,) * len(tied.layers), {name: 8 for name in tied.values}, Link(), 1.0)
    weights = problem_of(tied, profile, both.cluster, stages).weights
    shared = [weight for weight in weights if weight.nbytes == 100 * 64 * 4]
    assert [len(weight.users) for weight in shared] == [2]
    holders = {s.index for s in both.stages for layer in s.layers if layer in shared[0].users}
    assert len(holders) == 2
