"""Lower a training step: from what each device computes to gradients sent, weights reduced and updated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import ProgramError
from pipecompile.ir.graph import ModelGraph, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import COMPUTE, HOST, DeviceProgram, Edge, Instruction, Op, Program
from pipecompile.ir.training import Gradients
from pipecompile.passes.layers import free_results
from pipecompile.passes.lower import crossings
from pipecompile.simulate.step import step_ticks

_FORWARD = frozenset({Op.FORWARD})
_BACKWARD = frozenset({Op.BACKWARD, Op.BACKWARD_INPUT})
_LAST = frozenset({Op.BACKWARD, Op.BACKWARD_WEIGHT})


@dataclass(frozen=True)
class LowerStep:
    """Add edges, sends, receives, reductions and updates to a compute-only training step.

    A ring slot is the stash: what a stage receives lies there until its weight gradients are
    done, and the slot is posted again at that moment. A ring has ``ahead`` more slots than there
    are messages at once, so that the next ones arrive while the receiver computes.

    With ``early`` a stage updates right after its last backward, unless gradients of tied weights
    come from another device; else all stages of a device update at its end, as they must where
    something depends on all gradients together (their norm).

    The model's outputs go to the last stage, which computes the loss; or, with ``to_caller``,
    from where they are made to the caller, who sends their gradients back once all have come.

    Of data-parallel pipelines each is lowered alike. Their weights are tied like any others: every weight has one
    owner, to whom the others send their gradients, and who alone updates it; each pipeline owns about as many bytes
    (as in ZeRO's first stage, Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054).
    """

    ahead: int = 1
    to_caller: bool = False
    early: bool = False

    def apply(self, graph: ModelGraph, plan: Plan, program: Program, gradients: Gradients) -> Program:
        """The program with activations, gradients and tied weights as edges, and a STEP for each stage.

        ``program`` is the order of one pipeline. Values that have gradients send them back along every edge
        that carries them. A stage that needs no backward has its B and W removed.

        Raises:
            ProgramError: as :func:`pipecompile.passes.lower.crossings`.
        """
        one = replace(plan, stages=plan.pipeline, data_parallel=1)
        forward = _edges(graph, crossings(graph, one)) if self.to_caller else activations(graph, one)
        users = weight_users(graph, plan, gradients.weights)
        learns = learning_stages(weight_users(graph, one, gradients.weights), forward, gradients.values)
        backward = [
            Edge(
                e.target, e.source, values, tuple(gradient_spec(graph.values[v]) for v in values), 0, 0,
                "gradient" if e.target == HOST else "",
            )
            for e in forward
            if e.source != HOST and (values := tuple(v for v in e.values if v in gradients.values))
        ]
        device_of = {stage: device.device for device in program.devices for stage in device.stages}
        timeline = step_ticks(program)
        ends = {Instruction(Op(e.activity), e.stage, e.sample): e.end for e in timeline.events if e.activity in COMPUTE}
        sized = [self._sized(edge, program, device_of, ends) for edge in (*forward, *backward)]
        starts = [k * len(one.stages) for k in range(plan.data_parallel)]
        edges = [_later(edge, start) for start in starts for edge in sized]
        learns = {stage + start for start in starts for stage in learns}
        devices = [_moved(device, k, plan) for k in range(plan.data_parallel) for device in program.devices]
        everywhere = {stage: device.device for device in devices for stage in device.stages}
        edges += _tied(gradients.weights, users, everywhere)
        lowered = (self._device(device, edges, learns, owners(users)) for device in devices)
        return Program(tuple(lowered), tuple(edges), program.schedule, plan.data_parallel)

    def _sized(self, edge: Edge, program: Program, device_of: dict[int, int], ends: dict[Instruction, float]) -> Edge:
        """With enough slots that no sender waits when all work takes unit time; none within a device.

        That schedule can then be carried out, so the program cannot deadlock at any other speed:
        what a device waits for does not depend on time.
        """
        if edge.target == HOST:  # the caller has room for everything, and sends gradients when there is
            return replace(edge, ahead=program.micro_batches - 1, slots=program.micro_batches)
        if edge.kind == "gradient":
            ahead = min(self.ahead, program.micro_batches - 1)
            return replace(edge, ahead=ahead, slots=ahead + 1)
        if device_of.get(edge.source) == device_of[edge.target]:
            return edge
        changes: list[tuple[float, int]] = []
        for step, end in ends.items():
            if step.op in (_BACKWARD if edge.backward else _FORWARD):
                if step.stage == (edge.target if edge.source == HOST else edge.source):
                    changes.append((end, 1))
            if step.stage == edge.target and step.op in _LAST:
                changes.append((end, -1))
        held = peak = 0
        for _, change in sorted(changes, key=lambda change: (change[0], -change[1])):
            held += change
            peak = max(peak, held)
        slots = max(1, min(program.micro_batches, peak + self.ahead))
        return replace(edge, ahead=min(self.ahead, slots - 1), slots=slots)

    def _device(
        self, device: DeviceProgram, edges: Sequence[Edge], learns: Collection[int], owned: dict[int, list[str]]
    ) -> DeviceProgram:
        if device.body or device.drain or any(step.op not in COMPUTE for step in device.warm_up):
            raise ProgramError(f"device {device.device}: only a closed order of F, B, W and BW can be lowered")
        waits = {s: {s, *(e.source for e in edges if e.tied and e.target == s)} for s in device.stages if owned.get(s)}
        done, left = set[int](), [s for s in device.stages if s in waits]
        into = [e for e in edges if e.target in device.stages and e.slots]
        out = [e for e in edges if e.source in device.stages and e.slots]
        count = 1 + max((step.sample for step in device.warm_up), default=-1)
        steps = [Instruction(Op.RECV, e.target, i, e.name) for e in into for i in range(e.slots)]
        for step in device.warm_up:
            if step.op is not Op.FORWARD and step.stage not in learns:
                continue
            steps.append(step)
            steps += [Instruction(Op.SEND, e.source, step.sample, e.name) for e in _sends(out, step)]
            if step.op in _LAST or step.stage not in learns:
                again = ((e, step.sample + e.slots) for e in into if e.target == step.stage and not e.tied)
                steps += [Instruction(Op.RECV, e.target, i, e.name) for e, i in again if i < count]
            if step.op in _LAST and step.sample == count - 1:
                done.add(step.stage)
                ready = [s for s in left if self.early and waits[s] <= done]
                steps += [Instruction(Op.STEP, s, 0) for s in ready]
                left = [s for s in left if s not in ready]
        steps += [Instruction(Op.SEND, e.source, 0, e.name) for e in out if e.tied]
        steps += [Instruction(Op.REDUCE, e.target, 0, e.name) for e in into if e.tied]
        steps += [Instruction(Op.STEP, stage, 0) for stage in left]
        return DeviceProgram(device.device, device.stages, tuple(steps), ())


def _later(edge: Edge, stages: int) -> Edge:
    """The same edge of a pipeline whose stages are numbered from there on."""
    source, target = (end if end == HOST else end + stages for end in (edge.source, edge.target))
    return replace(edge, source=source, target=target)


def _moved(device: DeviceProgram, pipeline: int, plan: Plan) -> DeviceProgram:
    """What a device of the first pipeline does, as the one in its place in another does it."""
    stages = pipeline * len(plan.pipeline)
    steps = tuple(replace(step, stage=step.stage + stages) for step in device.warm_up)
    number = plan.stages[device.stages[0] + stages].device
    return replace(device, device=number, stages=tuple(s + stages for s in device.stages), warm_up=steps)


def activations(graph: ModelGraph, plan: Plan) -> list[Edge]:
    """Edges for what stages read, from stage to stage and from the caller; outputs go to the last stage."""
    last = len(plan.stages) - 1
    found: defaultdict[tuple[int, int], dict[str, None]] = defaultdict(dict)
    for (source, target), values in crossings(graph, plan).items():
        end = last if target == HOST else target
        if source != end:
            found[source, end].update(dict.fromkeys(values))
    for ref in graph.outputs:
        if ref.kind == "input":
            found[HOST, last][ref.name] = None
    return _edges(graph, found)


def _edges(graph: ModelGraph, found: Mapping[tuple[int, int], Iterable[str]]) -> list[Edge]:
    edges = [
        Edge(source, target, tuple(values), tuple(graph.values[v] for v in values), 0, 0)
        for (source, target), values in found.items()
        if values
    ]
    return sorted(edges, key=lambda edge: (edge.source, edge.target))


def weight_users(graph: ModelGraph, plan: Plan, trained: Collection[str]) -> dict[str, list[int]]:
    """Trained weight -> the stages that use it, the one that owns it first, the others in order.

    It is the first of its pipeline; of several pipelines, the one that so far owns least.
    """
    users: defaultdict[str, set[int]] = defaultdict(set)
    for stage in plan.stages:
        for layer in stage.layers:
            for name in graph.layers[layer].state:
                if name in trained:
                    users[name].add(stage.index)
    results = {ref.name for ref in graph.outputs}
    wanted = [node for node in graph.graph.nodes if node.name in results and node.name in graph.free]
    # The last stage computes these from its weights, as code generation does.
    made = free_results(graph.graph, wanted, graph.free)
    names = [ref.name for ref in graph.outputs if ref.kind == "state"]
    for name in (*names, *(arg.name for node in made for arg in node.all_input_nodes)):
        if name in trained:
            users[name] |= {stage.index for stage in plan.stages if plan.ends(stage.index)}
    found = {name: sorted(users[name]) for name in (e.name for e in graph.state) if name in users}
    if plan.data_parallel == 1:
        return found
    nbytes, owned = {entry.name: entry.nbytes for entry in graph.state}, [0] * plan.data_parallel
    for name in sorted(found, key=lambda name: -nbytes[name]):
        pipeline = min(range(plan.data_parallel), key=lambda k: owned[k])
        owned[pipeline] += nbytes[name]
        owner = next(s for s in found[name] if s // len(plan.pipeline) == pipeline)
        found[name] = [owner, *(s for s in found[name] if s != owner)]
    return found


def owners(users: dict[str, list[int]]) -> dict[int, list[str]]:
    """Stage -> the trained weights it updates."""
    owned: defaultdict[int, list[str]] = defaultdict(list)
    for name, stages in users.items():
        owned[stages[0]].append(name)
    return dict(owned)


def learning_stages(users: dict[str, list[int]], forward: Iterable[Edge], differentiable: Collection[str]) -> set[int]:
    """Stages with something to differentiate: trained weights, or inputs that have gradients."""
    found = {stage for stages in users.values() for stage in stages}
    found |= {e.target for e in forward if e.source != HOST and any(v in differentiable for v in e.values)}
    return found


def _sends(out: Sequence[Edge], step: Instruction) -> list[Edge]:
    """What follows a computation, the neighbour first."""
    kinds = {Op.FORWARD: False, Op.BACKWARD: True, Op.BACKWARD_INPUT: True}
    found = [
        e for e in out if e.source == step.stage and not e.tied and step.op in kinds and e.backward is kinds[step.op]
    ]
    return sorted(found, key=lambda e: (e.target == HOST, abs(e.target - e.source)))


def _tied(weights: Mapping[str, TensorSpec], users: dict[str, list[int]], device_of: dict[int, int]) -> list[Edge]:
    """One edge from each further device that uses a weight to the stage that owns it; none travels within a device.

    Those within a device say that the update has to wait for these stages too.
    """
    found: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for name, stages in users.items():
        home, sent = device_of[stages[0]], set[int]()
        for stage in stages[1:]:
            if device_of[stage] == home or device_of[stage] not in sent:
                found[stage, stages[0]].append(name)
            sent.add(device_of[stage])
    return [
        Edge(
            source, target, tuple(names), tuple(gradient_spec(weights[n]) for n in names), 0,
            int(device_of[source] != device_of[target]), "tied",
        )
        for (source, target), names in found.items()
    ]  # fmt: skip


def gradient_spec(spec: TensorSpec) -> TensorSpec:
    """The layout in which a gradient travels: that of its value where it is dense, else contiguous."""
    if spec.dynamic:
        return spec
    stride, step = list[int](), 1
    for size in reversed(spec.shape):
        stride.insert(0, step)
        step *= max(size, 1)
    dense = spec.extent == step and len(set(spec.stride)) == len(spec.stride)
    return replace(spec, skew=0, stride=spec.stride if dense else tuple(stride))


__all__ = ["LowerStep", "activations", "gradient_spec", "learning_stages", "owners", "weight_users"]
