"""A timeline in the trace event format of Chrome (chrome://tracing, ui.perfetto.dev)."""

from __future__ import annotations

import json
from typing import Any

from pipecompile.ir.package import Package
from pipecompile.ir.timeline import Timeline

_NAMES = {"F": "compute", "SEND": "send", "wait": "wait", "TRANSFER": "transfer"}


def chrome_trace(package: Package, *timelines: Timeline) -> str:
    """JSON of complete events ("ph": "X", microseconds): a process a timeline, a thread a device.

    Transfers run beside their device's work and get a thread of their own, as events of one thread must nest.
    """
    events: list[dict[str, Any]] = []
    devices = package.plan.cluster.devices
    for process, timeline in enumerate(timelines):
        title = f"{package.model}, {timeline.origin}"
        events.append({"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": title}})
        threads: dict[tuple[int, bool], int] = {}
        for event in timeline.events:
            beside = event.activity == "TRANSFER"
            thread = threads.setdefault((event.device, beside), 2 * event.device + beside)
            name = _NAMES.get(event.activity, event.activity)
            events.append(
                {
                    "name": f"{name} {event.sample}",
                    "cat": name,
                    "ph": "X",
                    "ts": event.start * 1e6,
                    "dur": (event.end - event.start) * 1e6,
                    "pid": process,
                    "tid": thread,
                    "args": {"sample": event.sample, "stage": event.stage, "edge": event.edge},
                }
            )
        for (device, beside), thread in threads.items():
            label = devices[device].name + (" transfers" if beside else "")
            events.append({"name": "thread_name", "ph": "M", "pid": process, "tid": thread, "args": {"name": label}})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
