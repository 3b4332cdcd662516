"""Drives the generated module of one device inside a worker process."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipecompile.errors import PipelineError
from pipecompile.ir.cluster import Link
from pipecompile.ir.program import Program
from pipecompile.runtime import numerics
from pipecompile.runtime.arena import open_state
from pipecompile.runtime.channels.link import DeviceLink, PortInfo, ports_of
from pipecompile.runtime.channels.ring import RingLayout, RingReceiver, RingSender, SampleFailed, clock
from pipecompile.runtime.channels.shared_memory import SharedEdge, attach
from pipecompile.runtime.module import describe, execute, resume
from pipecompile.runtime.records import Records


def run(boot: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """Run the device described by the boot message until its stream ends.

    Tells when the module waits for its first message, and of each sample that raised in it.

    Raises:
        Exception: whatever keeps it from starting or from going on (imports, syntax).
    """
    torch.set_num_threads(boot["threads"])
    torch.set_num_interop_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    numerics.restore(boot["numerics"])
    # Not inference_mode: in-place changes of shared weights must stay possible.
    torch.set_grad_enabled(False)
    for name in boot["imports"]:
        importlib.import_module(name)
    namespace = execute(boot["source"], boot["filename"])
    state = open_state(boot["arenas"], boot["state"])
    here = ports_of(Program.from_json(boot["program"]).edges, boot["stages"], boot["replica"])
    records = Records(attach(boot["records"]), len(here))
    ports = _ports(boot, here, records.awake)
    for fd in (*boot["arenas"], boot["records"], *(fds[0] for fds in boot["edges"].values())):
        os.close(fd)
    link = DeviceLink(state, ports)

    def report(error: Exception, sample: int) -> None:
        tell({"kind": "failed", **describe(error, boot["filename"], boot["device"], boot["stages"], sample)})

    def again(sample: int) -> Any:
        return resume(namespace["run"], link, ports, sample, boot["replicas"])

    _drive(namespace["run"](link, boot["replica"]), records, lambda: tell({"kind": "ready"}), report, again)


def _drive(
    steps: Any,
    records: Records,
    ready: Callable[[], None],
    report: Callable[[Exception, int], None],
    again: Callable[[int], Any],
) -> None:
    """Hand control back and forth between the module and the ports it waits for.

    A sample that raises is reported and passed over. One that failed in another device is known
    to the caller already.
    """
    try:
        port = next(steps)
    except StopIteration:
        ready()
        return
    ready()
    count, log, capacity = records.count, records.log, records.capacity
    number = at = 0
    while True:
        try:
            send = steps.send
            while True:
                at = (number % capacity) * 4
                number += 1
                log[at] = port.index
                log[at + 1] = port.sample
                log[at + 3] = 0.0
                log[at + 2] = clock()
                count[0] = number
                value = port.take()
                log[at + 3] = clock()
                port = send(value)
        except StopIteration:
            return
        except SampleFailed as failed:
            log[at + 3] = clock()
            sample = failed.sample
        except PipelineError:
            raise  # the rings themselves are broken
        except Exception as error:
            sample = int(log[at + 1])
            report(error, sample)
        steps = again(sample)
        port = next(steps)


def _ports(boot: dict[str, Any], here: Sequence[PortInfo], awake: memoryview[float]) -> list[RingReceiver | RingSender]:
    made: list[RingReceiver | RingSender] = []
    for index, port in enumerate(here):
        name = port.edge.name
        shared = SharedEdge(RingLayout.of(port.edge, boot["sizes"]), *boot["edges"][name])
        throttle = boot["throttle"].get(port.edge.between)
        if port.receives:
            made.append(shared.receiver(index, Link(*throttle) if throttle else None, awake))
        else:
            made.append(shared.sender(index, awake))
    return made
