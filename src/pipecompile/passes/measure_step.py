"""Measure the stages of a training step: forward, backward and its two halves, and what is kept in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.measure import Job, Measure
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import DeviceProgram, Op, Program
from pipecompile.ir.training import Gradients, StageCost
from pipecompile.passes.keep import cards
from pipecompile.passes.observe import copies
from pipecompile.passes.stage_code import IMPORTS, StageWriter, StepEmitter

#: What generated stages call, so that they can run again and again without a step around them.
_AROUND = """

class Sums(dict):
    def add(self, name, gradient):
        if gradient is not None:
            self[name] = self[name].add_(gradient) if name in self and not gradient.is_sparse else gradient.clone()


sums = Sums()


class Draw:
    def __call__(self, op):
        pass

    def statistics(self, norm, x, like):
        return torch.zeros_like(like), torch.zeros_like(like)


draw = Draw()
"""

#: The pieces of stage {s}. Arguments are flat: the model's loss where it is computed here, the state,
#: what the stage reads, the gradients of its results.
_PIECES = """

def given_{s}(a):
    trained = tuple(a[i] for i in {trained})
    return {loss}, a[{state}], trained, a[{reads}], a[{gradients}]


def kept_{s}(*a):
    loss, state, _, reads, _ = given_{s}(a)
    return forward_{s}(draw, *loss, state, *reads)


def run_forward_{s}(*a):
    kept_{s}(*a)


def run_backward_{s}(*a):
    _, _, trained, _, gradients = given_{s}(a)
    backward_{s}(kept_{s}(*a)[1], trained, sums, *gradients)


def run_backward_input_{s}(*a):
    _, _, trained, _, gradients = given_{s}(a)
    return backward_input_{s}(kept_{s}(*a)[1], trained, sums, *gradients)


def run_backward_weight_{s}(*a):
    _, _, trained, _, _ = given_{s}(a)
    backward_weight_{s}(run_backward_input_{s}(*a)[1], trained, sums)
"""

#: All a device does for one micro-batch.
_TURN = """

def turn_{d}(*a):
    {calls}
"""


@dataclass(frozen=True)
class MeasureStep:
    """Time every stage alone on real values, for about ``budget`` seconds a piece.

    Repeated alone a stage keeps its weights in its core's cache as far as they fit, which is what
    it does in a pipeline too, from one micro-batch to the next. With ``turns`` the jobs of what each
    device does are kept, and with them the activations that the stages are timed with.
    """

    budget: float = 0.3
    deferred: bool = False
    autocast: str | None = None
    turns: bool = False

    def apply(
        self,
        graph: ModelGraph,
        module: fx.GraphModule,
        tensors: Mapping[str, torch.Tensor],
        leaves: Sequence[Any],
        plan: Plan,
        program: Program,
        gradients: Gradients,
        loss: Callable[[Sequence[Any]], torch.Tensor],
        measure: Measure,
    ) -> MeasuredStep:
        """The stages' costs, of the kinds of backward that ``program`` uses.

        ``loss`` is a scalar function of the model's flat results.
        """
        emit = StepEmitter(graph, module, deferred=self.deferred, autocast=self.autocast)
        place = {stage: device for device in program.devices for stage in device.stages}
        writers = [StageWriter(emit, plan, program, gradients, place[s], s, 110) for s in range(len(plan.stages))]
        texts = [writer.source() for writer in writers]
        source = "\n\n".join([IMPORTS, *emit.functions.values(), _AROUND, *texts, *map(_pieces, writers)])
        namespace: dict[str, Any] = {}
        exec(compile(source, "<measured stages>", "exec"), namespace)
        values: dict[str, Any] = dict(zip(graph.inputs, copies(leaves), strict=True))
        written = {entry.name for entry in graph.state if entry.mutated}
        given: list[list[Any]] = []
        kept: list[tuple[int, int]] = []
        for s, writer in enumerate(writers):
            state = [copies([tensors[n]])[0] if n in written else tensors[n] for n in writer.state]
            reads = [values[v] for v in writer.reads]
            arguments = [*([_Spread(loss)] if writer.last else []), *state, *reads]
            received = [v for v in reads if isinstance(v, torch.Tensor)]
            known = [*(tensors[n] for n in writer.trained), *received]
            made, nbytes = _saved(partial(namespace[f"kept_{s}"], *arguments), known)
            came = sum(v.nbytes for v in received)
            kept.append((nbytes + came, came + sum(state[i].nbytes for i in writer.written)))
            if not writer.last:
                values.update(zip(writer.makes, [_plain(v) for v in made], strict=True))
            given.append(arguments + [torch.randn_like(values[v]) for v in writer.arrivals])
        pieces = [_timed(place[s], s) for s in range(len(writers))]
        places = [(s, piece) for s, those in enumerate(pieces) for piece in those]
        jobs = [Job(source, f"run_{piece}_{s}", given[s]) for s, piece in places]
        times = dict(zip(places, measure.functions(jobs, self.budget), strict=True))
        costs = tuple(_cost(times, s, *kept[s]) for s in range(len(writers)))
        turns = tuple(
            _turn(source, device.device, [(f"run_{pieces[s][-1]}_{s}", given[s]) for s in device.stages])
            for device in program.devices
        )
        return MeasuredStep(costs, turns if self.turns else ())


@dataclass(frozen=True)
class MeasuredStep:
    """What each stage takes alone; if asked for, per device of the program the job of all it does for one micro-batch."""

    costs: tuple[StageCost, ...]
    turns: tuple[Job, ...]


def _pieces(writer: StageWriter) -> str:
    """The code of one stage's pieces."""
    ends = [int(writer.last)]
    for part in (writer.state, writer.reads, writer.arrivals):
        ends.append(ends[-1] + len(part))
    state, reads, gradients = (f"{low}:{high}" for low, high in pairwise(ends))
    trained = [ends[0] + writer.state.index(name) for name in writer.trained]
    return _PIECES.format(
        s=writer.stage, loss=f"a[:{ends[0]}]", trained=trained, state=state, reads=reads, gradients=gradients
    )


def _timed(device: DeviceProgram, stage: int) -> list[str]:
    """The pieces of a stage to time; the last one has all of its work in it."""
    ops = {step.op for step in device.warm_up if step.stage == stage}
    pieces = ["forward", *(["backward"] if Op.BACKWARD in ops else [])]
    return pieces + (["backward_input", "backward_weight"] if Op.BACKWARD_INPUT in ops else [])


def _turn(source: str, device: int, work: Sequence[tuple[str, Sequence[Any]]]) -> Job:
    arguments, calls = list[Any](), list[str]()
    for function, given in work:
        calls.append(f"{function}(*a[{len(arguments)}:{len(arguments) + len(given)}])")
        arguments += given
    return Job(source + _TURN.format(d=device, calls="\n    ".join(calls)), f"turn_{device}", arguments)


def _cost(times: Mapping[tuple[int, str], float], stage: int, kept: int, stash: int) -> StageCost:
    """Each piece was timed together with what must come before it."""
    forward = times[stage, "forward"]
    whole = times.get((stage, "backward"), forward)
    first = times.get((stage, "backward_input"), forward)
    second = times.get((stage, "backward_weight"), first)
    halves = max(first - forward, 0.0), max(second - first, 0.0)
    return StageCost(forward, *halves, max(whole - forward, 0.0) or sum(halves), 0.0, kept, stash)


def _saved(run: Callable[[], Any], weights: Sequence[torch.Tensor]) -> tuple[Any, int]:
    """What a forward makes, and the bytes autograd keeps for its backward, weights not counted."""
    own = {w.untyped_storage().data_ptr() for w in weights}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> None:
        # Nothing goes back through this graph; to keep a result of it in it would be a cycle never freed.
        # The storages are held here instead: one freed meanwhile would lend its address to another.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage

    def never(_: None) -> torch.Tensor:
        raise AssertionError("this graph is not gone back through")

    with torch.random.fork_rng(devices=cards()), torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, never):
        made, kept = run()
    del kept
    return made, sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class _Spread:
    """The loss as stages call it."""

    loss: Callable[[Sequence[Any]], torch.Tensor]

    def __call__(self, *outputs: Any) -> torch.Tensor:
        return self.loss(outputs)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


__all__ = ["MeasureStep", "MeasuredStep"]
