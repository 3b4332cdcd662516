"""One device that learns on streams, inside its worker process."""

from __future__ import annotations

import importlib
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch

from pipecompile.ir.cluster import Link
from pipecompile.ir.learning import Rule
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.program import Edge
from pipecompile.ir.tree import Tree
from pipecompile.runtime import numerics, pickled
from pipecompile.runtime.arena import open_state
from pipecompile.runtime.channels.link import ports_of
from pipecompile.runtime.channels.ring import RingLayout, RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.channels.shared_memory import SharedEdge, attach
from pipecompile.runtime.learn import Judge, LearnLink, LearnOptions, LearnUpdates
from pipecompile.runtime.learn_sets import SharedSets
from pipecompile.runtime.module import execute
from pipecompile.runtime.records import Records
from pipecompile.runtime.step import step_error


@dataclass(frozen=True)
class LearnBoot:
    """All a worker needs to know. Descriptors are open in the worker under the same numbers."""

    module: DeviceModule
    rule: Rule
    stages: int
    edges: tuple[Edge, ...]
    fds: dict[str, tuple[int, int, int]]
    sizes: dict[str, int]
    throttle: dict[str, Link]
    records: int
    arenas: tuple[int, ...]
    state: list[dict[str, Any]]
    owned: dict[int, tuple[str, ...]]
    sets: SharedSets
    mutated: tuple[str, ...]
    options: LearnOptions
    out_tree: Tree
    target: Tree | None
    threads: int
    numerics: dict[str, Any]
    imports: tuple[str, ...]

    def device(self, commands: socket.socket) -> LearnDevice:
        """What runs in the worker."""
        return LearnDevice(self, commands)


class LearnDevice:
    """Answers the commands of :class:`pipecompile.runtime.process_learn.ProcessLearner`."""

    def __init__(self, boot: LearnBoot, commands: socket.socket) -> None:
        torch.set_num_threads(boot.threads)
        torch.set_num_interop_threads(1)
        torch.backends.mha.set_fastpath_enabled(False)
        numerics.restore(boot.numerics)
        torch.set_grad_enabled(False)  # the stages enable it where they record
        for name in boot.imports:
            importlib.import_module(name)
        self._module = boot.module
        tensors = dict(zip(boot.module.state, open_state(boot.arenas, boot.state), strict=True))
        ports: list[RingReceiver | RingSender] = []
        for index, port in enumerate(ports_of(boot.edges, boot.module.stages)):
            shared = SharedEdge(RingLayout.of(port.edge, boot.sizes), *boot.fds[port.edge.name])
            throttle = boot.throttle.get(port.edge.name)
            ports.append(shared.receiver(index, throttle) if port.receives else shared.sender(index))
        self._records = Records(attach(boot.records), len(ports))
        self._updates = LearnUpdates(boot.rule, boot.stages, boot.module, boot.owned, tensors, boot.options)

        def snapshot(part: dict[str, Any]) -> None:
            pickled.send(commands, ("snapshot", packed_parts(part)))

        word, sets = boot.sets.open()
        self._link = LearnLink(
            boot.rule, boot.stages, tensors, ports, self._updates, boot.options, snapshot, boot.mutated,
            (iter(sets).__next__, word),
        )  # fmt: skip
        if boot.stages - 1 in boot.module.stages:
            self._link.judge = Judge(boot.options, boot.out_tree, boot.target)
        self._run = execute(boot.module.source, boot.module.filename)["run"]
        self._sample = -1
        for fd in (*boot.arenas, boot.records, boot.sets.fd, *(fds[0] for fds in boot.fds.values())):
            os.close(fd)

    def answer(self, message: tuple[Any, ...]) -> tuple[Any, ...]:
        """Carry out one command; what goes wrong is part of the answer."""
        kind, *arguments = message
        try:
            return ("done", getattr(self, f"_do_{kind}")(*arguments))
        except Exception as error:
            where = f" at sample {self._sample}" if kind == "learn" else ""
            module = self._module
            return ("error", str(step_error(error, module.filename, module.device, module.stages, where)))

    def _do_learn(self, start: int, first: int) -> int:
        """One stream, to its end; how many updates were left out."""
        link, records = self._link, self._records
        link.offset = offset = first - start
        steps = self._run(link, start)
        count, log, capacity, resume = records.count, records.log, records.capacity, steps.send
        number = int(count[0])
        try:
            port = next(steps)
            while True:
                at = (number % capacity) * 4
                number += 1
                self._sample = port.sample + offset
                log[at], log[at + 1], log[at + 3] = port.index, self._sample, 0.0
                log[at + 2] = clock()
                count[0] = number
                try:
                    value = port.take()
                except SampleFailed:
                    value = None
                log[at + 3] = clock()
                port = resume(value)
        except StopIteration:
            return link.left_out()

    def _do_state(self) -> dict[str, Any]:
        updates = self._updates
        return packed_parts({"state": updates.state(), "groups": updates.groups(), "version": self._link.version})

    def _do_load(self, state: Any, settings: dict[str, Any], version: int | None) -> None:
        loaded = pickled.unpacked(state)
        if loaded:
            self._updates.load(loaded)
        self._updates.set(settings)
        if version is not None:
            self._link.version = version


def packed_parts(part: dict[str, Any]) -> dict[str, Any]:
    """What a device says of its state, with the tensors in it packed."""
    return {key: pickled.packed(value) if key in ("tensors", "state") else value for key, value in part.items()}


def unpacked_parts(part: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`packed_parts`."""
    return {key: pickled.unpacked(value) if key in ("tensors", "state") else value for key, value in part.items()}


__all__ = ["LearnBoot", "LearnDevice", "packed_parts", "unpacked_parts"]
