"""The rows of the integer program that say what a device's time, memory and latency are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import inf, isfinite, lcm

from pipecompile.passes.partition.model import TOP, Affine, Model
from pipecompile.passes.partition.problem import HOST, Problem, Value

Devices = tuple[int, ...]


def add_costs(model: Model, exact: bool) -> None:
    """Bound the objective from below by what :func:`~pipecompile.passes.partition.load.judge` counts, or less."""
    ledger = _Ledger(model, exact)
    ledger.compute()
    for value in model.problem.values:
        ledger.value(value)
    ledger.weights()
    if model.problem.limited:
        ledger.memory()
    ledger.close()


class _Ledger:
    """Expressions of what every device spends, by group of devices; all seconds x the model's scale."""

    def __init__(self, model: Model, exact: bool) -> None:
        self.model, self.problem, self.exact = model, model.problem, exact
        self.stages: dict[Devices, list[int]] = {}
        for stage, devices in enumerate(model.arrangement):
            self.stages.setdefault(devices, []).append(stage)
        self.computing: defaultdict[tuple[Devices, int], Affine] = defaultdict(Affine)
        self.moving: defaultdict[tuple[Devices, int], Affine] = defaultdict(Affine)
        self.summing: defaultdict[int, Affine] = defaultdict(Affine)
        self.bytes: defaultdict[int, Affine] = defaultdict(Affine)
        self.edges: dict[object, int] = {}
        self.open = [layer for layer, stage in enumerate(model.decided) if stage is None]
        self.best = [_best_link(self.problem, device) for device in range(len(self.problem.places))]

    def within(self, layer: int, group: Devices) -> Affine:
        """1 where the layer lies in one of the group's stages."""
        only = self.model.decided[layer]
        if only is not None:
            return Affine(const=float(self.model.arrangement[only] == group))
        found = Affine()
        for stage in self.stages[group]:
            if stage in self.model.reach(layer):
                found.add(self.model.inside(layer, stage))
        return found

    def groups(self, *layers: int) -> list[Devices]:
        """Groups that any of the layers can lie in."""
        reach = {s for layer in layers for s in self.model.reach(layer)}
        return [group for group, stages in self.stages.items() if reach.intersection(stages)]

    def pay(self, group: Devices, amount: Affine, seconds: Callable[[int], float]) -> None:
        """Add ``amount`` x ``seconds(device)`` to what each device of the group spends on a transfer."""
        for device in group:
            factor = seconds(device) * self.model.scale * self.problem.places[device].copies
            if factor:
                self.moving[group, device].add(amount, factor)

    def edge(self, key: object, because: Affine) -> tuple[int, bool]:
        """The column that is 1 where an edge exists, and whether it is new; ``because`` pushes it up."""
        new = key not in self.edges
        if new:
            self.edges[key] = self.model.column()
        self.model.at_least(self.edges[key], because)
        return self.edges[key], new

    def settled(self) -> dict[int, list[int]]:
        """Layers that have no choice, by their stage."""
        found: dict[int, list[int]] = {}
        for layer, stage in enumerate(self.model.decided):
            if stage is not None:
                found.setdefault(stage, []).append(layer)
        return found

    def internal(self, value: Value) -> bool:
        """Whether a value cannot leave the devices it is made on: most do, once the windows are narrow."""
        decided, arrangement = self.model.decided, self.model.arrangement
        made = None if value.producer == HOST else decided[value.producer]
        if made is None:
            return False
        group = arrangement[made]
        return all(
            read is not None and (read == made or arrangement[read] == group)
            for read in map(decided.__getitem__, value.consumers)
        )

    def compute(self) -> None:
        """Seconds of the layers."""
        seconds = [self.problem.seconds(device) for device in range(len(self.problem.places))]
        for stage, layers in self.settled().items():
            group = self.model.arrangement[stage]
            for device in group:
                self.computing[group, device].const += float(seconds[device][layers].sum()) * self.model.scale
        for layer in self.open:
            for stage in self.model.reach(layer):
                here, group = self.model.inside(layer, stage), self.model.arrangement[stage]
                for device in group:
                    self.computing[group, device].add(here, float(seconds[device][layer]) * self.model.scale)

    def value(self, value: Value) -> None:
        """Transfers of one value and its gradient."""
        if value.producer == HOST:
            self._asks(value)
            return
        if value.returned:
            self._returns(value)
        if self.internal(value):
            return
        if value.consumers and self.problem.traffic.multicast:
            self._once(value)
            if self.exact and self.problem.link.latency:
                self._edges(value)
        elif value.consumers and self.exact:
            self._copies(value)
        elif value.consumers:
            self._once(value)

    def _asks(self, value: Value) -> None:
        link, rate = self.problem.link, self.problem.traffic.receive
        for group in self.groups(*value.consumers):
            for stage in self.stages[group]:
                copy: int | None = None
                for layer in value.consumers:
                    if stage in self.model.reach(layer):
                        here = self.model.inside(layer, stage)
                        if link.latency:
                            self._host_edge("asks", group, stage, here)
                        if rate:
                            copy = self.model.column() if copy is None else copy
                            self.model.at_least(copy, here)
                if copy is not None:
                    self.pay(group, Affine({copy: 1.0}), lambda _: rate * value.nbytes / link.bandwidth)

    def _returns(self, value: Value) -> None:
        link = self.problem.link
        for group in self.groups(value.producer):
            self.pay(group, self.within(value.producer, group), lambda _: value.nbytes / link.bandwidth)
            for stage in self.stages[group] if link.latency else ():
                if stage in self.model.reach(value.producer):
                    self._host_edge("returns", group, stage, self.model.inside(value.producer, stage))

    def _host_edge(self, why: str, group: Devices, stage: int, here: Affine) -> None:
        column, new = self.edge((why, stage), here)
        if new:
            self.pay(group, Affine({column: 1.0}), lambda _: self.problem.link.latency)

    def _once(self, value: Value) -> None:
        """A stage pays once for a value that leaves it, and once for one that enters."""
        rate = self.problem.traffic.receive
        out, back = value.nbytes + rate * value.gradient, rate * value.nbytes + value.gradient
        edges = any(latency for latency, _ in self.best) and not value.backward
        for group in self.groups(value.producer):
            leaves = self.leaves(value, group)
            if leaves is not None:
                self.pay(group, leaves, lambda d: out * self.best[d][1])
                self._relaxed_edges(group, leaves, ("out", "back_in"), value, edges)
        for group in self.groups(*value.consumers) if back or edges else ():
            column: int | None = None
            for layer in value.consumers:
                row = self.within(layer, group).add(self.within(value.producer, group), -1.0)
                if row.terms or row.const > 0:
                    column = self.model.column() if column is None else column
                    self.model.at_least(column, row)
            if column is not None:
                enters = Affine({column: 1.0})
                self.pay(group, enters, lambda d: back * self.best[d][1])
                self._relaxed_edges(group, enters, ("in", "back_out"), value, edges)

    def _relaxed_edges(
        self, group: Devices, moves: Affine, sides: tuple[str, str], value: Value, edges: bool
    ) -> None:
        if not edges or (self.problem.traffic.multicast and self.exact):
            return
        for side in sides if value.gradient else sides[:1]:
            column, new = self.edge((side, group), moves)
            if new:
                self.pay(group, Affine({column: 1.0}), lambda d: self.best[d][0])

    def leaves(self, value: Value, group: Devices) -> Affine | None:
        """1 where the producer lies in the group and a reader outside it; None if that cannot be."""
        column: int | None = None
        for layer in value.consumers:
            row = self.within(value.producer, group).add(self.within(layer, group), -1.0)
            if row.terms or row.const > 0:
                column = self.model.column() if column is None else column
                self.model.at_least(column, row)
        return None if column is None else Affine({column: 1.0})

    def _pairs(self, value: Value) -> list[tuple[int, int]]:
        """Stages a value can be sent between."""
        targets = sorted({t for layer in value.consumers for t in self.model.reach(layer)})
        arrangement = self.model.arrangement
        return [
            (s, t)
            for s in self.model.reach(value.producer)
            for t in targets
            if arrangement[s] != arrangement[t] and (t > s or value.backward)
        ]

    def _crosses(self, value: Value, source: int, target: int) -> list[Affine]:
        """Rows that are 1 where the producer is in one stage and a reader in the other."""
        made = self.model.inside(value.producer, source)
        return [
            self.model.inside(layer, target).add(made).add(Affine(const=-1.0))
            for layer in value.consumers
            if target in self.model.reach(layer)
        ]

    def _copies(self, value: Value) -> None:
        """A copy for each other stage that reads the value."""
        rate, arrangement = self.problem.traffic.receive, self.model.arrangement
        copies: dict[tuple[int, int], int] = {}
        for s, t in self._pairs(value):
            copies[s, t] = self.model.column()
            copy, source, target = Affine({copies[s, t]: 1.0}), arrangement[s], arrangement[t]
            for row in self._crosses(value, s, t):
                self.model.at_least(copies[s, t], row)
            send, read = _ends(self.problem, source, target)
            back, got = _ends(self.problem, target, source)
            self.pay(source, copy, lambda d, send=send, got=got: (
                send[d][1] * value.nbytes + rate * got[d][1] * value.gradient))  # fmt: skip
            self.pay(target, copy, lambda d, read=read, back=back: (
                rate * read[d][1] * value.nbytes + back[d][1] * value.gradient))  # fmt: skip
            self._pair_edge(s, t, copy)
            if value.gradient:
                self._pair_edge(t, s, copy)
        # Not needed for correctness, but without them the relaxation of the copies is useless.
        for s in self.model.reach(value.producer):
            total = Affine({copy: -1.0 for (source, _), copy in copies.items() if source == s})
            for layer in value.consumers:
                gone = self.model.inside(value.producer, s).add(self.within(layer, arrangement[s]), -1.0)
                self.model.require(gone.add(total))
        for layer in value.consumers:
            for t in self.model.reach(layer):
                total = Affine({copy: -1.0 for (_, target), copy in copies.items() if target == t})
                come = self.model.inside(layer, t).add(self.within(value.producer, arrangement[t]), -1.0)
                self.model.require(come.add(total))

    def _edges(self, value: Value) -> None:
        """Edges between pairs of stages where the bytes are paid once."""
        for s, t in self._pairs(value):
            for row in self._crosses(value, s, t):
                self._pair_edge(s, t, row)
                if value.gradient:
                    self._pair_edge(t, s, row)

    def _pair_edge(self, source: int, target: int, because: Affine) -> None:
        senders, readers = self.model.arrangement[source], self.model.arrangement[target]
        send, read = _ends(self.problem, senders, readers)
        if not any(latency for latency, _ in (*send.values(), *read.values())):
            return
        column, new = self.edge((source, target), because)
        if new:
            self.pay(senders, Affine({column: 1.0}), lambda d: send[d][0])
            self.pay(readers, Affine({column: 1.0}), lambda d: read[d][0])

    def weights(self) -> None:
        """Bytes of weights, and seconds of summing the gradients of those that lie on several devices."""
        problem = self.problem
        every = problem.memory.update_every
        for weight in problem.weights if problem.limited or every else ():
            users = tuple(sorted(set(weight.users)))
            seconds = 2 * weight.nbytes / problem.link.bandwidth / every * self.model.scale if every else 0.0
            for group in self.groups(*users):
                if len(users) == 1:
                    held = self.within(users[0], group)
                else:
                    column = self.model.column()
                    for layer in users:
                        self.model.at_least(column, self.within(layer, group))
                    held = Affine({column: 1.0})
                spread = held
                if len(group) == 1:
                    column = self.model.column()
                    for one in users:
                        for other in users:
                            row = self.within(one, group).add(self.within(other, group), -1.0)
                            self.model.at_least(column, row)
                    spread = Affine({column: 1.0})
                for device in group:
                    self.bytes[device].add(held, weight.nbytes * problem.memory.copies)
                    if seconds:
                        self.summing[device].add(spread, seconds * problem.places[device].copies)

    def memory(self) -> None:
        """Bytes of activations and rings; then the limits."""
        problem, arrangement, memory = self.problem, self.model.arrangement, self.problem.memory
        settled = self.settled()
        for stage, group in enumerate(arrangement):
            flying = -(-memory.in_flight(stage, len(arrangement)) // len(group))
            for layer in self.open if problem.activations else ():
                if problem.activations[layer] and stage in self.model.reach(layer):
                    for device in group:
                        self.bytes[device].add(self.model.inside(layer, stage), flying * problem.activations[layer])
            if problem.activations:
                held = sum(problem.activations[layer] for layer in settled.get(stage, ()))
                for device in group:
                    self.bytes[device].const += flying * held
        for value in problem.values if memory.slots else ():
            if self.internal(value):
                continue
            for stage in sorted({s for layer in value.consumers for s in self.model.reach(layer)}):
                group, column = arrangement[stage], self.model.column()
                own = Affine() if value.producer == HOST else self.within(value.producer, group)
                for layer in value.consumers:
                    if stage in self.model.reach(layer):
                        self.model.at_least(column, self.model.inside(layer, stage).add(own, -1.0))
                for device in group:
                    self.bytes[device].add(Affine({column: 1.0}), memory.slots * value.nbytes)
            for group in self.groups(value.producer) if value.producer != HOST and value.gradient else ():
                leaves = self.leaves(value, group)
                for device in group if leaves is not None else ():
                    self.bytes[device].add(leaves or Affine(), memory.slots * value.gradient)
        for device, needed in self.bytes.items():
            room = problem.places[device].memory
            if isfinite(room):
                unit = 100.0 / max(room, 1.0)
                self.model.require(Affine(const=-room * unit).add(needed, unit))

    def close(self) -> None:
        """Tie objective and limits to the expressions."""
        model, goal, overlap = self.model, self.problem.goal, self.problem.traffic.overlap
        longest = Affine()
        busy: defaultdict[int, Affine] = defaultdict(Affine)
        moving: defaultdict[int, Affine] = defaultdict(Affine)
        for group in self.stages:
            column = model.column(upper=inf) if len(group) > 1 else None
            for device in group:
                single = Affine().add(self.computing[group, device]).add(self.moving[group, device])
                busy[device].add(self.computing[group, device], 1 / len(group))
                moving[device].add(self.moving[group, device], 1 / len(group))
                if column is None:
                    longest.add(single)
                else:
                    model.require(single.add(Affine({column: -1.0})))
            if column is not None:
                longest.add(Affine({column: 1.0}))
        throughput = goal.kind == "throughput"
        limit = Affine(const=goal.limit * model.scale)
        for device, computing in busy.items():
            moving[device].add(self.summing[device])
            top = Affine({TOP: 1.0}) if throughput else limit
            if isfinite(top.const):
                model.require(Affine().add(computing).add(moving[device], 1 - overlap).add(top, -1.0))
                if overlap:
                    model.require(Affine().add(moving[device]).add(top, -1.0))
        ceiling = limit if throughput else Affine({TOP: 1.0})
        if isfinite(ceiling.const):
            model.require(longest.add(ceiling, -1.0))


def _best_link(problem: Problem, device: int) -> tuple[float, float]:
    """The least latency, and the least seconds per byte, of any transfer the device can have a part in."""
    others = [other for other in range(len(problem.places)) if other != device]
    links = [problem.link, *(problem.between(device, o) for o in others), *(problem.between(o, device) for o in others)]
    return min(link.latency for link in links), min(1 / link.bandwidth for link in links)


def _ends(
    problem: Problem, senders: Devices, readers: Devices
) -> tuple[dict[int, tuple[float, float]], dict[int, tuple[float, float]]]:
    """Mean latency and seconds per byte, per sample of its own, of each sender and of each reader."""
    period = lcm(len(senders), len(readers))
    met = [(senders[i % len(senders)], readers[i % len(readers)]) for i in range(period)]

    def mean(device: int, side: int) -> tuple[float, float]:
        links = [problem.between(*pair) for pair in met if pair[side] == device]
        return sum(k.latency for k in links) / len(links), sum(1 / k.bandwidth for k in links) / len(links)

    return {d: mean(d, 0) for d in senders}, {d: mean(d, 1) for d in readers}


__all__ = ["add_costs"]
