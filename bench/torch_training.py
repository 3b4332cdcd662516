"""Peers in training: torch.distributed.pipelining on the same stages, and DistributedDataParallel, over gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


class _Ranks:
    """Two ranks of a gloo group, each on a core of its own. ``nan`` where they fail."""

    def __init__(self, target: Any, jobs: list[Any]) -> None:
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank, job in enumerate(jobs):
            here, there = context.Pipe()
            arguments = (there, f"file://{self._folder.name}/store", rank, job)
            process = context.Process(target=target, args=arguments, daemon=True)
            process.start()
            there.close()
            self._processes.append((process, here))
        try:
            answers = [here.recv() if here.poll(60) else "no answer" for _, here in self._processes]
        except EOFError:
            answers = ["died"]
        if any(answer != "ready" for answer in answers):
            print(*(str(a).strip().splitlines()[-1] for a in answers if a != "ready"), sep="\n")
            self.close()

    def run(self, seconds: float) -> float:
        """Steps a second, or nan."""
        if not self._processes:
            return float("nan")
        for _, here in self._processes:
            here.send(seconds)
        return min(here.recv() for _, here in self._processes)

    def close(self) -> None:
        """End both ranks."""
        for process, _ in self._processes:
            process.kill()
            process.join(10)
        self._processes = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TorchPipeline(_Ranks):
    """The stages of a compiled two-stage pipeline under one of torch's schedules; nan where edges form no chain."""

    def __init__(self, pipe: Any, x: torch.Tensor, y: torch.Tensor, schedule: str, parts: int) -> None:
        package = pipe.step_package.package
        edges = {edge.name: edge for edge in package.program.edges}
        if len(package.plan.stages) != 2 or not set(edges) <= {"host>0", "0>1", "1>0"} or len(edges["0>1"].values) != 1:
            self._processes = []
            return
        state = pipe._weights.current()
        middle = [(spec.shape, spec.dtype) for spec in edges["0>1"].specs]
        jobs = [
            (m.source, {n: state[n].detach().clone() for n in m.state}, [n for n in m.state if state[n].requires_grad],
             middle, x, y, schedule, parts)
            for m in package.modules
        ]  # fmt: skip
        super().__init__(_pipeline_rank, jobs)


class DataParallel(_Ranks):
    """Both ranks train the whole model on half of the batch each."""

    def __init__(self, build: Callable[[str], Any], name: str) -> None:
        super().__init__(_parallel_rank, [(build, name)] * 2)


class _Stage(nn.Module):
    """A generated stage function as a module with parameters of its own."""

    def __init__(self, source: str, stage: int, state: dict[str, torch.Tensor], trained: list[str]) -> None:
        super().__init__()
        namespace: dict[str, Any] = {}
        exec(compile(source, f"<stage {stage}>", "exec"), namespace)
        self.function, self.names = namespace[f"stage_{stage}"], list(state)
        for name, tensor in state.items():
            if name in trained:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    def forward(self, value: torch.Tensor) -> Any:
        made, _ = self.function(lambda op: None, *(getattr(self, name) for name in self.names), value)
        return made[0]


def _serve(pipe: Connection, rank: int, step: Callable[[], None]) -> None:
    import torch.distributed as dist

    step()
    step()
    pipe.send("ready")
    while True:
        seconds = pipe.recv()
        start = time.perf_counter()
        step()
        times = torch.tensor([max(1, int(seconds / (time.perf_counter() - start)))])
        dist.broadcast(times, 0)
        start = time.perf_counter()
        for _ in range(int(times)):
            step()
        dist.barrier()
        pipe.send(int(times) / (time.perf_counter() - start))


def _begin(store: str, rank: int) -> None:
    import torch.distributed as dist

    os.sched_setaffinity(0, [rank])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store, rank=rank, world_size=2)


def _pipeline_rank(pipe: Connection, store: str, rank: int, job: Any) -> None:
    import torch.distributed.pipelining as pipelining

    try:
        source, state, trained, middle, x, y, schedule_name, parts = job
        _begin(store, rank)
        module = _Stage(source, rank, state, trained)
        optimizer = SGD(list(module.parameters()))
        shape = (x.shape[0] // parts, *x.shape[1:])
        inner = [torch.zeros(s, dtype=getattr(torch, d)) for s, d in middle]
        ins = [torch.zeros(shape, dtype=x.dtype)] if rank == 0 else [t.requires_grad_() for t in inner]
        with torch.no_grad():
            outs = inner if rank == 0 else [module(ins[0].detach())]
        outs = [o.detach().requires_grad_() for o in outs]
        stage = pipelining.PipelineStage(
            module, rank, 2, torch.device("cpu"), input_args=tuple(ins), output_args=tuple(outs)
        )
        schedule = getattr(pipelining, schedule_name)(stage, parts, loss_fn=nn.CrossEntropyLoss())

        def step() -> None:
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(x)
            else:
                schedule.step(target=y)
            optimizer.step()

        _serve(pipe, rank, step)
    except Exception:
        pipe.send(traceback.format_exc())


def _parallel_rank(pipe: Connection, store: str, rank: int, job: Any) -> None:
    try:
        build, name = job
        _begin(store, rank)
        model, x, y = build(name)
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        optimizer, loss_fn = SGD(list(model.parameters())), nn.CrossEntropyLoss()
        half, target = x.chunk(2)[rank], y.chunk(2)[rank]

        def step() -> None:
            optimizer.zero_grad()
            loss_fn(model(half), target).backward()
            optimizer.step()

        _serve(pipe, rank, step)
    except Exception:
        pipe.send(traceback.format_exc())
