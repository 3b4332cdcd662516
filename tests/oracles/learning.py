"""Online learning in one process, sample by sample: what a pipeline must equal under every rule and clock.

Shares no code with the package and needs only torch. Four rules are whole-model autograd: a plain
loop (``sync``), a loop with a lag of one version (``2bw``), gradients at a composite of delayed
versions (``weight_stashing``), the same with the weights swapped between forward and backward
(``stale``). ``sideways`` mixes samples within a gradient, so it is carried out stage by stage, in
the order that the clock gives each stage; :func:`by_stages` also does ``weight_stashing`` and
``stale`` that way, which checks the others.

Where a value has three readers or more, gradients may be added in another order than elsewhere:
models that are compared bit for bit have two at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Sample = tuple[tuple[Tensor, ...], Any]  #: the arguments of the model, and the target or None
Loss = Callable[[Any, Any], Tensor]
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
Gradients = dict[str, Tensor | None]
Rule = Literal["sync", "weight_stashing", "2bw", "stale", "sideways"]


@dataclass
class Part:
    """A stage. ``call(weights, values)`` gives what it makes of what it reads, by name.

    The last stage makes ``output`` alone; ``weights`` are the names of the parameters it uses, and
    ``buffers`` the tensors that ``call`` writes to.
    """

    weights: list[str]
    reads: list[str]
    call: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
    buffers: list[Tensor] = field(default_factory=list)


@dataclass
class Run:
    """What learning leaves: one entry a sample, and the gradients that each stage used."""

    outputs: list[Tensor] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    versions: list[tuple[int, ...]] = field(default_factory=list)
    gradients: list[dict[int, Gradients]] = field(default_factory=list)
    left_out: int = 0  #: updates whose mean gradient was not finite


def delays(stages: int, clock: str) -> list[int]:
    """By how many samples a forward runs ahead of the backward: S-1-s, twice that in lockstep."""
    ahead = [stages - 1 - s for s in range(stages)]
    return [2 * w for w in ahead] if clock == "lockstep" else ahead


def learn(
    model: nn.Module, parts: Sequence[Part], samples: Sequence[Sample], loss_fn: Loss, optimizer: Optimizer, rule: Rule,
    *, clock: str = "1f1b", accumulate: int = 1, scaled: bool = False,
) -> Run:  # fmt: skip
    """Let ``model`` learn from the samples in place; ``scaled`` divides learning rates by 1 + delay."""
    count = len(parts)
    late = [0] * count if rule == "sync" else [min(1, count - 1)] * count if rule == "2bw" else delays(count, clock)
    updates = Updates(model, parts, optimizer, accumulate, len(samples), late if scaled else [0] * count)
    if rule == "sideways":
        run = by_stages(parts, samples, loss_fn, updates, late, rule)
    elif rule == "sync":
        ahead = [min(count - 1 - s, accumulate - 1) for s in range(count)]
        run = in_groups(model, samples, loss_fn, updates, Buffers(parts, ahead, accumulate), lag=0)
    elif rule == "2bw":
        run = in_groups(model, samples, loss_fn, updates, Buffers(parts, delays(count, clock)), lag=late[0])
    else:
        buffers = Buffers(parts, late)
        run = at_composites(model, samples, loss_fn, updates, late, buffers, swap=rule == "stale")
    run.left_out = updates.left_out
    return run


class Buffers:
    """What a sample that is skipped leaves in buffers: nothing, and what followed it until its backward is lost too.

    A stage that is ``ahead`` by so many forwards has done them by then; with ``group`` never those of the next group.
    """

    def __init__(self, parts: Sequence[Part], ahead: Sequence[int], group: int = 1 << 60) -> None:
        self.parts, self.ahead, self.group = parts, ahead, group
        self.lost = [-1 for _ in parts]  # the last sample whose traces are gone
        self.values: list[list[Tensor]] = []

    def before(self) -> None:
        self.values = [[buffer.clone() for buffer in part.buffers] for part in self.parts]

    def after(self, k: int, skipped: bool) -> None:
        for s, (part, values) in enumerate(zip(self.parts, self.values, strict=True)):
            if skipped and k > self.lost[s]:
                self.lost[s] = min(k + self.ahead[s], k - k % self.group + self.group - 1)
            if k <= self.lost[s]:
                for buffer, value in zip(part.buffers, values, strict=True):
                    buffer.data.copy_(value)


class Updates:
    """One optimizer a stage. After each n samples, and after the last, a step with the mean of their gradients.

    A sample without a gradient (no target, or a loss that is not finite) counts for the n, not for the mean. A
    stage whose mean is not finite makes no step, and counts it.
    """

    def __init__(
        self, model: nn.Module, parts: Sequence[Part], optimizer: Optimizer, every: int, total: int, late: Sequence[int]
    ) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = [{name: named[name] for name in part.weights if name in named} for part in parts]
        self.every, self.total = every, total
        self.optimizers = [optimizer(list(w.values())) if w else None for w in self.weights]
        for each, delay in zip(self.optimizers, late, strict=True):
            for group in each.param_groups if each else []:
                group["lr"] = group["lr"] / (1 + delay)
        self.left_out = 0
        self.sums: list[Gradients] = [{} for _ in parts]
        self.found = [0 for _ in parts]
        self.before = [[0] for _ in parts]  #: before[s][k]: updates of stage s when the backward of k begins

    def end(self, stage: int, k: int, gradients: Gradients | None) -> None:
        """The backward of sample k is done on this stage."""
        sums, version = self.sums[stage], self.before[stage][k]
        if gradients is not None:
            self.found[stage] += 1
            for name, gradient in gradients.items():
                if gradient is not None:
                    before = sums.get(name)
                    sums[name] = gradient if before is None else before + gradient
        if ((k + 1) % self.every == 0 or k + 1 == self.total) and self.found[stage]:
            for name, p in self.weights[stage].items():
                total = sums.get(name)
                p.grad = None if total is None else total / self.found[stage]
            optimizer = self.optimizers[stage]
            grads = [p.grad for p in self.weights[stage].values() if p.grad is not None]
            finite = all(bool(grad.isfinite().all()) for grad in grads)
            self.left_out += not finite
            if optimizer is not None and finite:
                optimizer.step()
            sums.clear()
            self.found[stage], version = 0, version + 1
        self.before[stage].append(version)


def in_groups(
    model: nn.Module, samples: Sequence[Sample], loss_fn: Loss, updates: Updates, buffers: Buffers, lag: int
) -> Run:
    """Groups of n samples at the newest weights (``lag`` 0), or at those of one update before."""
    run, live = Run(), {name: p for weights in updates.weights for name, p in weights.items()}
    current = {name: p.detach().clone() for name, p in live.items()}
    for k, sample in enumerate(samples):
        if k % updates.every == 0:
            previous, current = current, {name: p.detach().clone() for name, p in live.items()}
            read = {name: value.requires_grad_() for name, value in (previous if lag else current).items()}
            at = max(0, k - lag * updates.every)
            version = tuple(before[at] for before in updates.before)
        loss = forward(model, read, sample, loss_fn, run, buffers)
        run.versions.append(version)
        backward(loss, read, updates, k, run)
    return run


def at_composites(
    model: nn.Module, samples: Sequence[Sample], loss_fn: Loss, updates: Updates, late: Sequence[int],
    buffers: Buffers, swap: bool,
) -> Run:  # fmt: skip
    """Sample k is evaluated with each stage as it was ``late[stage]`` samples ago."""
    run, live = Run(), {name: p for weights in updates.weights for name, p in weights.items()}
    delay = {name: d for weights, d in zip(updates.weights, late, strict=True) for name in weights}
    past: dict[int, dict[str, Tensor]] = {}
    for k, sample in enumerate(samples):
        past[k] = {name: p.detach().clone() for name, p in live.items()}
        past.pop(k - max(late) - 1, None)
        read = {name: past[max(0, k - d)][name].clone().requires_grad_() for name, d in delay.items()}
        loss = forward(model, read, sample, loss_fn, run, buffers)
        run.versions.append(tuple(b[max(0, k - d)] for b, d in zip(updates.before, late, strict=True)))
        if swap:
            for name, value in read.items():
                value.data.copy_(live[name])  # what autograd has saved of the weights is seen at its new value
        backward(loss, read, updates, k, run)
    return run


def forward(
    model: nn.Module, read: dict[str, Tensor], sample: Sample, loss_fn: Loss, run: Run, buffers: Buffers
) -> Tensor | None:
    """The model at the weights ``read``; its loss if there is something to learn."""
    inputs, target = sample
    buffers.before()
    output = functional_call(model, read, inputs)
    loss = record(run, output, None if target is None else loss_fn(output, target))
    buffers.after(len(run.outputs) - 1, skipped=loss is None and target is not None)
    return loss


def record(run: Run, output: Tensor, loss: Tensor | None) -> Tensor | None:
    """Note the result of a sample; the loss if it is one to learn from."""
    run.outputs.append(output.detach().clone())
    run.losses.append(None if loss is None else float(loss.detach()))
    return loss if loss is not None and math.isfinite(float(loss.detach())) else None


def backward(loss: Tensor | None, read: dict[str, Tensor], updates: Updates, k: int, run: Run) -> None:
    """Gradients of the whole model, and the update of every stage."""
    found: Gradients = {}
    if loss is not None:
        found = dict(zip(read, torch.autograd.grad(loss, list(read.values()), allow_unused=True), strict=True))
    run.gradients.append({})
    for stage, weights in enumerate(updates.weights):
        if loss is not None:
            run.gradients[k][stage] = {name: found[name] for name in weights}
        updates.end(stage, k, run.gradients[k].get(stage))


def program_order(total: int, ahead: int) -> list[tuple[str, int]]:
    """What a stage does: ``ahead`` forwards, then forward and backward in turns, then the backwards left."""
    order = [("F", k) for k in range(min(ahead, total))]
    for k in range(total):
        order += [("F", k + ahead), ("B", k)] if k + ahead < total else [("B", k)]
    return order


@dataclass
class Graph:
    """What a forward leaves for a backward."""

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    made: dict[str, Tensor]


def by_stages(
    parts: Sequence[Part], samples: Sequence[Sample], loss_fn: Loss, updates: Updates, late: Sequence[int], rule: Rule
) -> Run:
    """Every stage in its program order, each instruction as soon as the neighbour has done its own of that sample."""
    run, last, total = Run(), len(parts) - 1, len(samples)
    todo = [program_order(total, ahead) for ahead in late]
    values = [{f"input{i}": value for i, value in enumerate(inputs)} for inputs, _ in samples]
    errors: list[dict[str, Tensor]] = [{} for _ in samples]
    graphs: list[dict[int, Graph]] = [{} for _ in parts]
    before: list[dict[int, list[Tensor]]] = [{} for _ in parts]  # buffers, from before forwards
    learned = [False] * total  # whether the sample has a loss to learn from
    run.versions, run.gradients = [()] * total, [{} for _ in samples]
    done: set[tuple[int, str, int]] = set()

    def f(s: int, k: int) -> None:
        run.versions[k] += (updates.before[s][-1],)
        if samples[k][1] is not None:
            before[s][k] = [buffer.clone() for buffer in parts[s].buffers]
        own = rule == "weight_stashing"  # its own copy of the weights; else a view that sees later updates
        read = {n: (p.detach().clone() if own else p.data).requires_grad_() for n, p in updates.weights[s].items()}
        inputs = {name: values[k][name].detach() for name in parts[s].reads}
        for name, value in inputs.items():
            value.requires_grad_(not name.startswith("input") and value.is_floating_point())
        made = parts[s].call(read, inputs)
        if s == last:
            target = samples[k][1]
            loss = record(run, made["output"], None if target is None else loss_fn(made["output"], target))
            learned[k] = loss is not None
            made, errors[k] = ({"loss": loss}, {"loss": torch.ones_like(loss)}) if loss is not None else ({}, {})
        values[k].update(made)
        graphs[s][k] = Graph(read, inputs, made)
        if rule == "sideways":
            graphs[s] = {k: graphs[s][k]}

    def b(s: int, k: int) -> None:
        old = before[s].pop(k, None)
        if old is not None and not learned[k]:
            before[s].clear()
            for buffer, value in zip(parts[s].buffers, old, strict=True):
                buffer.data.copy_(value)
        graph = graphs[s][max(graphs[s])] if rule == "sideways" else graphs[s].pop(k)
        if learned[k]:
            outs = [name for name, value in graph.made.items() if value.requires_grad and name in errors[k]]
            sources = {**graph.weights, **{n: v for n, v in graph.inputs.items() if v.requires_grad}}
            found = torch.autograd.grad(
                [graph.made[name] for name in outs], list(sources.values()), [errors[k][name] for name in outs],
                retain_graph=rule == "sideways", allow_unused=True,
            )  # fmt: skip
            gradients = dict(zip(sources, found, strict=True))
            for name in graph.inputs:
                gradient = gradients.get(name)
                if gradient is not None:
                    errors[k][name] = gradient + errors[k][name] if name in errors[k] else gradient
            run.gradients[k][s] = {name: gradients[name] for name in graph.weights}
        updates.end(s, k, run.gradients[k].get(s))

    while any(todo):
        for s, order in enumerate(todo):
            needed = order and ((s - 1, "F") if order[0][0] == "F" else (s + 1, "B"))
            if needed and (not 0 <= needed[0] <= last or (*needed, order[0][1]) in done):
                op, k = order.pop(0)
                (f if op == "F" else b)(s, k)
                done.add((s, op, k))
    return run
