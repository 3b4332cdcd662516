"""When the work of a training step can be done, from its text form alone: longest paths in a DAG.

Shares no code with the schedules, the verifier or the simulator. An instruction waits for the one
before it on its device; ``sFi`` for ``(s-1)Fi``; ``sBi`` (or ``sBWi``) for ``sFi`` and for the
backward of stage ``s + 1``; ``sWi`` for ``sBi``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import networkx as nx

SECONDS = {"F": 1.0, "B": 1.0, "W": 1.0, "BW": 2.0}


def finish_times(devices: Sequence[Sequence[str]]) -> dict[str, float]:
    """Word -> when it ends, in unit time. Raises networkx.NetworkXUnfeasible if the order has a cycle."""
    parsed = {}
    for words in devices:
        for word in words:
            stage, op, sample = re.fullmatch(r"(\d+)(F|BW|B|W)(\d+)", word).groups()  # type: ignore[union-attr]
            assert word not in parsed, f"{word} occurs twice"
            parsed[word] = (int(stage), op, int(sample))
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(parsed)
    back = {(stage, sample): word for word, (stage, op, sample) in parsed.items() if op in ("B", "BW")}
    for words in devices:
        nx.add_path(graph, words)
    for word, (stage, op, sample) in parsed.items():
        if op == "F" and stage:
            graph.add_edge(f"{stage - 1}F{sample}", word)
        if op in ("B", "BW"):
            graph.add_edge(f"{stage}F{sample}", word)
            if (stage + 1, sample) in back:
                graph.add_edge(back[stage + 1, sample], word)
        if op == "W":
            graph.add_edge(f"{stage}B{sample}", word)
    assert set(graph) == set(parsed), "an instruction waits for one that does not exist"
    ends: dict[str, float] = {}
    for word in nx.topological_sort(graph):
        begin = max((ends[before] for before in graph.predecessors(word)), default=0.0)
        ends[word] = begin + SECONDS[parsed[word][1]]
    return ends
