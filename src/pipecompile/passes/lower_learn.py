"""Lower learning on a stream: activations and slips forward, gradients back, targets in, results out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import PlanError, ProgramError
from pipecompile.ir.graph import ModelGraph, TensorSpec
from pipecompile.ir.learning import SLIP, VERDICT, Rule, TargetSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Op, Program
from pipecompile.ir.training import Gradients
from pipecompile.passes.lower_step import activations, gradient_spec, learning_stages, weight_users

#: Results that may wait for the caller.
_RESULTS = 4


@dataclass(frozen=True)
class LowerLearn:
    """Add edges, sends and receives to a compute-only program of :func:`~pipecompile.schedules.learning.learning`.

    A ring slot is the stash: what a stage receives lies there until the backward of its sample is
    done (under ``sideways`` until the next forward begins), and is posted again at that moment. A
    ring has ``ahead`` slots more than that, so that messages arrive while the receiver computes.
    """

    rule: Rule
    ahead: int = 1

    def apply(
        self, graph: ModelGraph, plan: Plan, program: Program, gradients: Gradients, target: TargetSpec | None = None
    ) -> Program:
        """The program with its edges. Stages without anything to learn lose their backward.

        Raises:
            PlanError: if a weight is used in several stages.
            ProgramError: as :func:`pipecompile.passes.lower.crossings`.
        """
        _refuse_spread_weights(graph, plan, gradients)
        stages = len(plan.stages)
        forward = activations(graph, plan)
        learns = learning_stages(weight_users(graph, plan, gradients.weights), forward, gradients.values)
        backward = [
            Edge(e.target, e.source, values, tuple(gradient_spec(graph.values[v]) for v in values), 0, 0)
            for e in forward
            if e.source in learns and (values := tuple(v for v in e.values if v in gradients.values))
        ]
        chain = _chained(forward, stages)
        edges = [self._sized(edge, stages, learns) for edge in (*chain, *backward)]
        if target is not None:
            names = tuple(f":target.{i}" for i in range(len(target.leaves)))
            bring = Edge(HOST, stages - 1, names, target.leaves, 0, 0, "target")
            edges.append(self._sized(bring, stages, learns))
        edges.append(_result(graph, stages))
        devices = (self._device(device, edges, learns, stages) for device in program.devices)
        return Program(tuple(devices), tuple(edges), program.schedule)

    def _sized(self, edge: Edge, stages: int, learns: set[int]) -> Edge:
        """With as many slots as there are messages at once when nobody waits, and ``ahead`` more.

        When its target is about to compute the forward of ``k``, the source of an edge may have
        computed as many further ones as it runs ahead more than the target; the target still
        needs those whose backward is to come. Likewise backwards.
        """
        lead = [self.rule.ahead(max(stage, 0), stages) for stage in (edge.source, edge.target)]
        if edge.backward:
            slots = lead[1] - lead[0] + 1
        else:
            kept = lead[1] if self.rule.updates != "sideways" else min(lead[1], 1)
            slots = lead[0] - lead[1] + kept * (edge.target in learns) + 1 + (edge.source == HOST)
        return replace(edge, ahead=self.ahead, slots=slots + self.ahead)

    def _device(self, device: DeviceProgram, edges: Sequence[Edge], learns: set[int], stages: int) -> DeviceProgram:
        (stage,) = device.stages
        into = [e for e in edges if e.target == stage]
        out = [e for e in edges if e.source == stage]
        early = stage in learns and self.rule.updates == "sideways" and self.rule.ahead(stage, stages) > 0
        # Without a backward nothing keeps a stage from being as far ahead as its rings let it.
        own = device if stage in learns else replace(
            device, warm_up=(), body=(Instruction(Op.FORWARD, stage, 0),), turn=1
        )  # fmt: skip

        def lowered(steps: Sequence[Instruction]) -> list[Instruction]:
            found: list[Instruction] = []
            for step in steps:
                found.append(step)
                i = step.sample
                back = step.op is Op.BACKWARD
                found += [
                    Instruction(Op.SEND, stage, i, e.name)
                    for e in sorted(out, key=_distance)
                    if step.op in (Op.FORWARD, Op.BACKWARD) and e.backward == back
                ]
                if step.op is Op.STEP:
                    continue
                # The slot of the activations kept: that of this backward, or of the forward before.
                free = i - 1 if early and not back else i
                done = (not back if early else back) or stage not in learns
                found += [
                    Instruction(Op.RECV, stage, (i if e.backward else free) + e.slots, e.name)
                    for e in into
                    if (back if e.backward else done) and (i if e.backward else free) >= 0
                ]
            return found

        posts = [Instruction(Op.RECV, stage, i, e.name) for e in into for i in range(e.slots)]
        return replace(own, warm_up=(*posts, *lowered(own.warm_up)), body=tuple(lowered(own.body)))


def _distance(edge: Edge) -> int:
    """The neighbour first; results last."""
    return abs(edge.target - edge.source) if edge.target != HOST else 1 << 30


def _chained(forward: Sequence[Edge], stages: int) -> list[Edge]:
    """Every stage hands a slip to the next, beside what it sends anyway."""
    slip = TensorSpec((1 + stages,), "int64", (1,))
    found = {(edge.source, edge.target): edge for edge in forward}
    for stage in range(stages):
        ends = stage - 1 if stage else HOST, stage
        edge = found.get(ends, Edge(*ends, (), (), 0, 0))
        found[ends] = replace(edge, values=(*edge.values, SLIP), specs=(*edge.specs, slip))
    return [edge for _, edge in sorted(found.items())]


def _result(graph: ModelGraph, stages: int) -> Edge:
    names = tuple(dict.fromkeys(ref.name for ref in graph.outputs))
    for ref in graph.outputs:
        if ref.kind == "state" or ref.name not in graph.values:
            raise ProgramError(f"the model returns {ref.name!r}, which depends on no input: leave it out of its result")
    specs = (*(graph.values[name] for name in names), TensorSpec((1 + stages,), "int64", (1,)), TensorSpec((2,), "float64", (1,)))
    return Edge(stages - 1, HOST, (*names, SLIP, VERDICT), specs, 0, _RESULTS, "result")


def _refuse_spread_weights(graph: ModelGraph, plan: Plan, gradients: Gradients) -> None:
    names = {entry.name: entry.fqn for entry in graph.state}
    for name, stages in weight_users(graph, plan, gradients.weights).items():
        if len(stages) > 1:
            raise PlanError(
                f"weight {names[name]!r} is used in stages {stages}: mode='learn' updates a weight in one stage only. "
                "The last stage makes the model's result of it: leave it out of the result, or use one device"
            )


__all__ = ["LowerLearn"]
