"""How good are the plans? The planner on the field's own workloads, beside optima, experts and simple methods.

    python -m bench.partition [--data ../shared/partition-workloads] [--only bert] [--markdown]

Costs are in the files' units (milliseconds). Loads of the other methods are given as multiples of
ours. ``gap`` is what is proved: the objective is at most so much above the optimum.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.baselines import BASELINES, cut
from bench.workloads import expert, pipedream, piper, throughput
from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Goal, Place, Placement, Problem, Solution, Value, judge, solve
from pipecompile.passes.partition.ilp import build
from pipecompile.passes.partition.model import SCALE
from pipecompile.passes.partition.solvers import Engine
from pipecompile.passes.partition.windows import Windows

DATA = Path(__file__).resolve().parents[2] / "shared" / "partition-workloads"

Row = tuple[str, ...]


def ratio(load: float, ours: float) -> str:
    return f"{load / ours:.2f}" if ours else "-"


def proof(solution: Solution) -> str:
    return (
        "optimal" if solution.gap <= 1e-6 else f"{solution.gap:.2%}" if solution.gap > 1e-4 else f"{solution.gap:.0e}"
    )


def others(problem: Problem, ours: float, devices: int) -> list[str]:
    return [ratio(cut(problem, method, devices), ours) for method in BASELINES.values()]


def throughput_rows(data: Path, only: str, limit: float) -> Iterator[Row]:
    expected: dict[str, Any] = json.loads((data / "expected.json").read_text())
    for name, facts in expected.items():
        if name.startswith("_") or only not in name:
            continue
        for cpus in (0, 1):
            workload = throughput(data / "throughput-inputs" / f"{name}.json", cpus=cpus)
            problem = workload.problem
            started = time.perf_counter()
            solution = solve(problem, limit)
            seconds = time.perf_counter() - started
            best, ours = facts[f"l{cpus}"], solution.objective
            simple = others(problem, ours, facts["k"])
            yield (
                name.replace("Graphs", "").replace("inference", "inf").replace("training", "train"),
                f"{facts['k']}+{cpus}",
                str(problem.layers),
                f"{ours:.4f}",
                f"{best:.4f}",
                f"{ours / best - 1:+.0e}",
                proof(solution),
                solution.solver,
                f"{seconds:.2f}",
                *simple,
                by_experts(data, name, workload, ours),
            )


def by_experts(data: Path, name: str, workload: Any, ours: float) -> str:
    """Load of the human experts' split, as a multiple of ours."""
    stem = Path(name).name
    for candidate in (stem, stem.replace("training", "inference")):
        file = data / "human-experts" / f"{candidate}_expert.json"
        if file.exists() and name.startswith("Layer"):
            devices = expert(file, workload)
            if devices is None:
                return "parted"
            count = max(devices) + 1
            return ratio(judge(workload.problem, Placement(devices, tuple((d,) for d in range(count)))).slowest, ours)
    return "-"


def latency_rows(data: Path, only: str, limit: float) -> Iterator[Row]:
    for path in sorted((data / "latency-inputs").glob("*/*.json")):
        if only not in str(path):
            continue
        problem = replace(throughput(path, cpus=1).problem, goal=Goal("latency"))
        solution = solve(problem, limit)
        used = len(solution.placement.devices)
        yield (
            f"{path.parent.name.replace('Graphs', '')}/{path.stem.replace('inference', 'inf')}",
            f"{used} of {len(problem.places)}",
            str(problem.layers),
            f"{solution.objective:.3f}",
            proof(solution),
            solution.solver,
            f"{solution.seconds:.2f}",
        )


def profile_rows(data: Path, only: str, limit: float) -> Iterator[Row]:
    for path in sorted((data / "pipedream-profiles").glob("*.graph.txt")):
        for devices in (2, 4, 8):
            name = path.name.removesuffix(".graph.txt").split("__")[1]
            if only not in name:
                continue
            problem = pipedream(path, devices)
            solution = solve(problem, limit)
            yield (
                name,
                str(devices),
                str(problem.layers),
                f"{solution.objective:.3f}",
                proof(solution),
                solution.solver,
                f"{solution.seconds:.2f}",
                *others(problem, solution.objective, devices),
            )


def piper_rows(data: Path, only: str, limit: float) -> Iterator[Row]:
    for path in sorted((data / "piper-inputs").glob("*.json")):
        if only not in path.name:
            continue
        problem = piper(path, 8)
        for replicas in (False, True):
            solution = solve(replace(problem, replicas=replicas, idle=not replicas), limit)
            widths = "+".join(str(len(stage)) for stage in solution.placement.devices)
            yield (
                path.stem,
                widths,
                str(problem.layers),
                f"{solution.objective:.3f}",
                proof(solution),
                solution.solver,
                f"{solution.seconds:.2f}",
            )


def chain(rng: random.Random) -> Problem:
    n, k = rng.randint(12, 60), rng.randint(2, 8)
    values = tuple(Value(i, (i + 1,), 0.0) for i in range(n - 1))
    edges = tuple((i, i + 1) for i in range(n - 1))
    cost = tuple(rng.random() for _ in range(n))
    return Problem(cost, edges, values, (Place(),) * k, Link(0.0, 1.0))


def chain_rows(count: int) -> Iterator[Row]:
    """Random chains: how far from the optimum each method is."""
    rng = random.Random(0)
    ratios: dict[str, list[float]] = {name: [] for name in BASELINES}
    proved, seconds = 0, 0.0
    for _ in range(count):
        problem = chain(rng)
        solution = solve(problem)
        seconds += solution.seconds
        proved += solution.gap <= 1e-9
        for name, method in BASELINES.items():
            ratios[name].append(cut(problem, method, len(problem.places)) / solution.objective)
    yield (
        "pipecompile",
        "1.000",
        "1.000",
        "1.000",
        f"{proved}/{count} proved optimal, {seconds / count * 1e3:.1f} ms each",
    )
    for name, found in ratios.items():
        found.sort()
        best = sum(r <= 1 + 1e-9 for r in found)
        yield (
            name,
            f"{statistics.median(found):.3f}",
            f"{found[int(0.99 * count)]:.3f}",
            f"{found[-1]:.3f}",
            f"optimal in {best}",
        )


def large_rows() -> Iterator[Row]:
    """Transformer-like graphs of growing size on eight devices."""
    for layers in (300, 1000, 3000):
        problem = transformer(layers)
        solution = solve(problem)
        yield (
            str(layers),
            f"{solution.objective * 1e3:.3f}",
            proof(solution),
            solution.solver,
            f"{solution.seconds:.2f}",
        )


def transformer(layers: int, devices: int = 8) -> Problem:
    """Blocks of twelve operators with two residual paths and one mask that all of them read."""
    rng, cost, readers = random.Random(0), [1e-4, 5e-5], dict[int, set[int]]()
    stream = 0
    while len(cost) < layers:
        start = len(cost)
        for offset in range(min(12, layers - start)):
            reads = {start + offset - 1} if offset else {stream}
            reads |= {1} if offset == 4 else {stream} if offset == 6 else {start + 6} if offset == 11 else set()
            for source in reads:
                readers.setdefault(source, set()).add(start + offset)
            cost.append(rng.choice([2e-5, 5e-5, 8e-4, 1.5e-3]) * rng.uniform(0.9, 1.1))
        stream = len(cost) - 1
    values = [Value(u, tuple(sorted(vs)), 3e6 if u != 1 else 1e5) for u, vs in readers.items()]
    values += [Value(-1, (0, 1), 8e3), Value(layers - 1, (), 4e6, returned=True)]
    edges = tuple(sorted((u, v) for u, vs in readers.items() for v in vs))
    return Problem(tuple(cost), edges, tuple(values), (Place(),) * devices)


def quick_rows(data: Path) -> Iterator[Row]:
    """Twenty seconds against two, against the dynamic programs alone, and against planning a hundred groups."""
    graphs = {"cells of branches": cells(56), "transformer": transformer(500)}
    for name in ("nasnetamobile", "nasnetalarge", "densenet121"):
        path = data / "pipedream-profiles" / f"image_classification__{name}.graph.txt"
        if path.exists():
            graphs[name] = pipedream(path, 8)
    for name, problem in graphs.items():
        whole = solve(problem, 20.0, gap=1e-3)
        row = (name, str(problem.layers), f"{whole.objective:.4g}", proof(whole), f"{whole.seconds:.2f}")
        for limit, coarsen in ((2.0, problem.layers), (0.0, problem.layers), (2.0, 100)):
            quick = solve(problem, limit, gap=1e-3, coarsen=coarsen)
            row += (f"{quick.objective / whole.objective:.3f}", f"{quick.seconds:.2f}")
        yield row


def open_rows(data: Path, seconds: float = 60.0) -> Iterator[Row]:
    """Our search on graphs of about 500 layers against HiGHS with every layer free to lie in any stage."""
    graphs = {"cells of branches": cells(56), "transformer": transformer(500)}
    path = data / "pipedream-profiles" / "image_classification__densenet121.graph.txt"
    if path.exists():
        graphs["densenet121"] = pipedream(path, 8)
    for name, problem in graphs.items():
        ours = solve(problem, 20.0, gap=2e-2)
        stages = len(problem.places)
        arrangement = tuple((device,) for device in range(stages))
        free = Windows((0,) * problem.layers, (stages - 1,) * problem.layers)
        begun = time.perf_counter()
        model = build(problem, arrangement, free, 2 * ours.objective, exact=False)
        with Engine() as engine:
            answer = engine.solve("highs", model, None, seconds, 2e-2)
        took = time.perf_counter() - begun
        found = "nothing" if answer.values is None else f"{judge(problem, model.read(answer.values)).slowest:.4g}"
        yield (
            name,
            str(problem.layers),
            f"{ours.objective:.4g}",
            proof(ours),
            f"{ours.seconds:.2f}",
            found,
            f"{1 - 2 * answer.bound / SCALE:.1%} below ours",
            f"{took:.2f}",
            f"{took / ours.seconds:.0f}x",
        )


def cells(count: int, branches: int = 4, devices: int = 8) -> Problem:
    """Cells of parallel branches, each reading the two cells before it, as found by architecture search."""
    rng, cost, readers = random.Random(0), [1.0], dict[int, set[int]]()
    ends = [0, 0]
    for _ in range(count):
        outs: list[int] = []
        for _ in range(branches):
            last = rng.choice(ends)
            for _ in range(rng.randint(1, 3)):
                readers.setdefault(last, set()).add(len(cost))
                last = len(cost)
                cost.append(rng.expovariate(1.0))
            outs.append(last)
        for out in outs:
            readers.setdefault(out, set()).add(len(cost))
        ends = [ends[1], len(cost)]
        cost.append(rng.random() * 0.1)
    values = [Value(u, tuple(sorted(vs)), rng.random() * 0.2) for u, vs in readers.items()]
    edges = tuple(sorted((u, v) for u, vs in readers.items() for v in vs))
    return Problem(tuple(cost), edges, tuple(values), (Place(),) * devices, Link(0.0, 1.0))


def show(console: Console, title: str, heads: Row, rows: Iterator[Row], markdown: bool) -> None:
    if markdown:
        print(f"\n{title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)
        return
    table = Table(*heads, title=title)
    with console.status(title):
        for row in rows:
            table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the workloads")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--tables", default="throughput,profiles,latency,piper,chains,quick,large")
    parser.add_argument("--time-limit", type=float, default=10.0)
    parser.add_argument("--chains", type=int, default=3000)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    wanted = options.tables.split(",")
    if not (options.data / "expected.json").exists() and set(wanted) - {"chains", "large"}:
        sys.exit(f"no workloads in {options.data}: name their folder with --data, or ask for --tables chains,large")
    console, data, only, limit = Console(), options.data, options.only, options.time_limit
    simple = tuple(BASELINES)
    ours = ("graph", "devices", "nodes", "ours", "proof", "by", "s")
    tables: dict[str, tuple[str, Row, Iterator[Row]]] = {
        "throughput": (
            "Throughput: largest load, accelerators + CPUs",
            ("graph", "devices", "nodes", "ours", "expected", "off by", "proof", "by", "s", *simple, "experts"),
            throughput_rows(data, only, limit),
        ),
        "profiles": ("PipeDream's profiles", (*ours, *simple), profile_rows(data, only, 2 * limit)),
        "latency": ("Latency of one sample, stages in turn", ours, latency_rows(data, only, limit)),
        "piper": ("Piper's workloads, alone and with replicas (devices a stage)", ours, piper_rows(data, only, limit)),
        "chains": (
            f"{options.chains} random chains, as multiples of the optimum",
            ("method", "median", "99 %", "worst", ""),
            chain_rows(options.chains),
        ),
        "quick": (
            "Twenty seconds, and multiples of it: in two, by the dynamic programs alone, as a hundred merged groups",
            ("graph", "layers", "20 s", "proof", "s", "2 s", "s", "0 s", "s", "merged", "s"),
            quick_rows(data),
        ),
        "open": (
            "To within 2%: our search, and HiGHS with every layer free to lie in any stage (60 s)",
            ("graph", "layers", "ours", "proof", "s", "HiGHS", "its bound", "s", "ours is faster by"),
            open_rows(data),
        ),
        "large": ("Transformer-like graphs, 8 devices", ("layers", "ms", "proof", "by", "s"), large_rows()),
    }
    for name in wanted:
        title, heads, rows = tables[name]
        show(console, title, heads, rows, options.markdown)


if __name__ == "__main__":
    main()
