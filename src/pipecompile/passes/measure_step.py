"""Measure the stages of a training step: forward, backward and its two halves, and what is kept in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.measure import Job, Measure
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Op, Program
from pipecompile.ir.training import Gradients, StageCost
from pipecompile.passes.observe import copies
from pipecompile.passes.stage_code import IMPORTS, StageWriter, StepEmitter

#: The pieces of a stage as functions that can be called again and again.
_PIECES = """

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


def kept_by_forward(loss, state, reads):
    return forward_{s}(draw, *loss, state, *reads)


def forward(loss, state, trained, reads, gradients):
    kept_by_forward(loss, state, reads)


def backward(loss, state, trained, reads, gradients):
    backward_{s}(kept_by_forward(loss, state, reads)[1], trained, sums, *gradients)


def backward_input(loss, state, trained, reads, gradients):
    return backward_input_{s}(kept_by_forward(loss, state, reads)[1], trained, sums, *gradients)


def backward_weight(loss, state, trained, reads, gradients):
    backward_weight_{s}(backward_input(loss, state, trained, reads, gradients)[1], trained, sums)
"""


@dataclass(frozen=True)
class MeasureStep:
    """Time every stage alone on real values, for about ``budget`` seconds a piece.

    Repeated alone a stage keeps its weights in its core's cache as far as they fit, which is what
    it does in a pipeline too, from one micro-batch to the next.
    """

    budget: float = 0.3
    deferred: bool = False
    autocast: str | None = None

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
    ) -> tuple[StageCost, ...]:
        """Per stage its costs, of the kinds of backward that ``program`` uses.

        ``loss`` is a scalar function of the model's flat results.
        """
        values: dict[str, Any] = dict(zip(graph.inputs, copies(leaves), strict=True))
        written = {entry.name for entry in graph.state if entry.mutated}
        jobs: list[Job] = []
        places: list[tuple[int, str]] = []
        kept: list[tuple[int, int]] = []
        for stage in plan.stages:
            s = stage.index
            device = next(d for d in program.devices if s in d.stages)
            emit = StepEmitter(graph, module, deferred=self.deferred, autocast=self.autocast)
            writer = StageWriter(emit, plan, program, gradients, device, s, 110)
            text = writer.source()
            source = "\n\n".join([IMPORTS, *emit.functions.values(), text, _PIECES.replace("{s}", str(s))])
            state = tuple(copies([tensors[n]])[0] if n in written else tensors[n] for n in writer.state)
            trained = tuple(tensors[n] for n in writer.trained)
            reads = tuple(values[v] for v in writer.reads)
            given = (_spread(loss),) if writer.last else ()
            namespace: dict[str, Any] = {}
            exec(compile(source, f"<stage {s}>", "exec"), namespace)
            received = [v for v in reads if isinstance(v, torch.Tensor)]
            made, nbytes = _saved(partial(namespace["kept_by_forward"], given, state, reads), [*trained, *received])
            came = sum(v.nbytes for v in received)
            kept.append((nbytes + came, came + sum(state[i].nbytes for i in writer.written)))
            if not writer.last:
                values.update(zip(writer.makes, [_plain(v) for v in made], strict=True))
            back = tuple(torch.randn_like(values[v]) for v in writer.arrivals)
            ops = {step.op for step in device.warm_up if step.stage == s}
            pieces = ["forward", *(["backward"] if Op.BACKWARD in ops else [])]
            pieces += ["backward_input", "backward_weight"] if Op.BACKWARD_INPUT in ops else []
            jobs += [Job(source, piece, (given, state, trained, reads, back)) for piece in pieces]
            places += [(s, piece) for piece in pieces]
        times = dict(zip(places, measure.functions(jobs, self.budget), strict=True))
        return tuple(_cost(times, s, *kept[s]) for s in range(len(plan.stages)))


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

    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, never):
        made, kept = run()
    del kept
    return made, sum(storage.nbytes() for storage in storages.values())


def _spread(loss: Callable[[Sequence[Any]], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def loss_of(*outputs: Any) -> torch.Tensor:
        return loss(outputs)

    return loss_of


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


__all__ = ["MeasureStep"]
