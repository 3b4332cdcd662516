"""Partitioning workloads of other planners' authors, as problems of ours.

Formats: the node lists of Tarnawski et al. (NeurIPS 2020, msr-fiddle/dnn-partitioning), Piper's
(NeurIPS 2021) and PipeDream's profiles (SOSP 2019). Only the data is read, nothing of their code.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Memory, Place, Problem, Traffic, Value, Weight
from pipecompile.passes.partition.contract import Contraction, contract

#: Costs and transfers are given in time units: a "byte" takes one unit.
UNIT = Link(0.0, 1.0)


@dataclass(frozen=True)
class Workload:
    """A problem with its nodes grouped as the file demands, and the node ids of each group."""

    problem: Problem
    ids: tuple[tuple[int, ...], ...]


def throughput(path: Path, accelerators: int | None = None, cpus: int = 0) -> Workload:
    """A workload of dnn-partitioning: accelerators pay for a tensor once as its sender and once as a receiver.

    Nodes of one colour class share a device. Backward nodes lie where their forward nodes do; those
    without one get the precedence of a forward node, mirrored from their backward neighbours. CPUs
    pay for no transfer.

    Raises:
        PlanError: if the nodes are on a cycle.
    """
    data: dict[str, Any] = json.loads(path.read_text())
    nodes: list[dict[str, Any]] = data["nodes"]
    index = {node["id"]: i for i, node in enumerate(nodes)}
    backward = [bool(node["isBackwardNode"]) for node in nodes]
    colours: dict[int, list[int]] = defaultdict(list)
    for i, node in enumerate(nodes):
        if node.get("colorClass") is not None:
            colours[node["colorClass"]].append(i)
    orphans = set(range(len(nodes))) - {
        i for group in colours.values() for i in group if not all(backward[j] for j in group)
    }
    orphans = {i for i in orphans if backward[i]}

    edges: set[tuple[int, int]] = set()
    cost: dict[int, float] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    for edge in data["edges"]:
        u, v = index[edge["sourceId"]], index[edge["destId"]]
        readers[u].append(v)
        cost[u] = edge["cost"]
        if not backward[u] and not backward[v]:
            edges.add((u, v))
        elif backward[u] and backward[v] and (u in orphans or v in orphans):
            edges.add((v, u))
    values = [Value(u, tuple(sorted(set(vs))), cost[u], backward=True) for u, vs in readers.items()]
    count = data["maxFPGAs"] if accelerators is None else accelerators
    places = [Place(f"accelerator {i}", memory=data["maxSizePerFPGA"]) for i in range(count)]
    slow = tuple(float(node["cpuLatency"]) for node in nodes)
    places += [Place(f"cpu {i}", cost=slow, copies=0.0) for i in range(cpus)]
    weights = [Weight(node["size"], (i,)) for i, node in enumerate(nodes) if node["size"]]
    problem, order = _sorted(
        [float(node["fpgaLatency"]) for node in nodes], edges, values, weights, tuple(places), list(colours.values())
    )
    return Workload(problem.problem, tuple(tuple(nodes[order[i]]["id"] for i in group) for group in problem.groups))


def _sorted(
    costs: list[float],
    edges: set[tuple[int, int]],
    values: list[Value],
    weights: list[Weight],
    places: tuple[Place, ...],
    merges: list[list[int]],
) -> tuple[Contraction, list[int]]:
    """The problem with merged nodes; nodes are numbered so that merging leaves each edge pointing up."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(costs)))
    graph.add_edges_from(edges)
    # Nodes that need each other share a device, so only their component has a place in an order.
    component: dict[int, int] = {}
    parts = list(nx.strongly_connected_components(graph))
    for number, part in enumerate(parts):
        component.update(dict.fromkeys(part, number))
    condensed = nx.condensation(graph, parts)
    order = [v for part in nx.topological_sort(condensed) for v in sorted(parts[part])]
    at = {v: i for i, v in enumerate(order)}
    forward = tuple(sorted({(at[u], at[v]) for u, v in edges if component[u] != component[v]}))
    places = tuple(replace(p, cost=tuple(p.cost[v] for v in order)) if p.cost else p for p in places)
    problem = Problem(
        cost=tuple(costs[v] for v in order),
        edges=forward,
        values=tuple(replace(x, producer=at[x.producer], consumers=tuple(at[v] for v in x.consumers)) for x in values),
        places=places,
        link=UNIT,
        traffic=Traffic(multicast=True, receive=1.0),
        weights=tuple(replace(w, users=tuple(at[v] for v in w.users)) for w in weights),
        idle=True,
    )
    together = [[at[v] for v in group] for group in merges] + [[at[v] for v in part] for part in parts if len(part) > 1]
    return contract(problem, together), order


_NODE = re.compile(r"^(node\d+) -- (.*) -- forward_compute_time=([\d.e+-]+), backward_compute_time=([\d.e+-]+), "
                   r"activation_size=(\[?[^\]]*?\]?), parameter_size=([\d.e+-]+)$")  # fmt: skip


def pipedream(path: Path, devices: int, bandwidth: float = 25e9) -> Problem:
    """A profile of PipeDream, in milliseconds: forward and backward, activations sent on and their gradients back.

    A stage pays 2 x activation / ``bandwidth`` (bytes per second) for a tensor it sends, and as much for one it gets.

    Raises:
        PlanError: if a line cannot be read.
    """
    costs: list[float] = []
    sizes: list[float] = []
    weights: list[Weight] = []
    index: dict[str, int] = {}
    edges: set[tuple[int, int]] = set()
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if line.startswith("\t"):
            u, _, v = line.strip().partition(" -- ")
            edges.add((index[u], index[v]))
        elif line.strip():
            found = _NODE.match(line)
            if found is None:
                raise PlanError(f"{path.name}, line {number}: not a node of a profile: {line[:60]!r}")
            index[found[1]] = len(costs)
            costs.append(float(found[3]) + float(found[4]))
            sizes.append(sum(float(part) for part in re.split(r"[;,\s]+", found[5].strip("[]")) if part))
            if float(found[6]):
                weights.append(Weight(float(found[6]), (len(costs) - 1,)))
    readers: dict[int, list[int]] = defaultdict(list)
    for u, v in sorted(edges):
        readers[u].append(v)
    values = [Value(u, tuple(vs), 2 * sizes[u] / bandwidth * 1e3) for u, vs in readers.items()]
    contraction, _ = _sorted(costs, edges, values, weights, tuple(Place(str(i)) for i in range(devices)), [])
    return contraction.problem


def piper(path: Path, devices: int) -> Problem:
    """A workload of Piper, in milliseconds: stages may be replicated, 1F1B keeps the memory, no recomputation.

    The file gives bytes in flight (A) and fixed (B) per node and the bytes of parameters that replicas
    must sum; the problem scales all parameters alike to the sum of B.

    Raises:
        PlanError: if the nodes are on a cycle.
    """
    data: dict[str, Any] = json.loads(path.read_text())
    index = {node["id"]: i for i, node in enumerate(data["nodes"])}
    variants = [next(v for v in node["TMPCs"]["1"] if v["id"] == "vanilla") for node in data["nodes"]]
    readers: dict[int, list[int]] = defaultdict(list)
    size: dict[int, float] = {}
    for edge in data["edges"]:
        readers[index[edge["sourceId"]]].append(index[edge["destId"]])
        size[index[edge["sourceId"]]] = edge["communicationCost"]
    values = [Value(u, tuple(sorted(set(vs))), size[u], gradient=size[u]) for u, vs in readers.items()]
    edges = {(u, v) for u, vs in readers.items() for v in vs}
    weights = [Weight(v["parameterSize"], (i,)) for i, v in enumerate(variants) if v["parameterSize"]]
    places = tuple(Place(str(i), memory=data["maxMemoryPerDevice"]) for i in range(devices))
    contraction, order = _sorted([v["timePerSample"] for v in variants], edges, values, weights, places, [])
    held = [variants[v]["memoryUsageA"] for v in order]
    fixed = sum(v["memoryUsageB"] for v in variants)
    return replace(
        contraction.problem,
        link=Link(0.0, data["bandwidth"] / 1e3),
        activations=tuple(sum(held[i] for i in group) for group in contraction.groups),
        memory=Memory(
            copies=fixed / max(1.0, sum(w.nbytes for w in weights)),
            schedule="1f1b",
            micro_batches=data["mbsInBatch"],
            update_every=float(data["mbsInBatch"]),
        ),
        replicas=True,
    )


def expert(path: Path, workload: Workload) -> tuple[int, ...] | None:
    """The group of devices human experts gave each layer, or None if the file parts a colour class.

    A file for inference also says where the forward nodes of the training graph go.
    """
    data: dict[str, Any] = json.loads(path.read_text())
    where = {node: i for i, device in enumerate(data["fpgas"]) for node in device["nodes"]}
    found: list[int] = []
    for ids in workload.ids:
        devices = {where[node] for node in ids if node in where}
        if len(devices) != 1:
            return None
        found.append(devices.pop())
    return tuple(found)


__all__ = ["UNIT", "Workload", "expert", "pipedream", "piper", "throughput"]
