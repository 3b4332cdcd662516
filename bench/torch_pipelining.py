"""torch.distributed.pipelining over gloo with the same split, as a peer to measure against."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import nn


class _StageModule(nn.Module):
    """A generated stage function as a module."""

    def __init__(self, source: str, stage: int, state: list[torch.Tensor]) -> None:
        super().__init__()
        namespace: dict[str, Any] = {}
        exec(compile(source, f"<stage {stage}>", "exec"), namespace)
        self.function, self.state = namespace[f"stage_{stage}"], state

    def forward(self, *values: torch.Tensor) -> Any:
        result = self.function(*self.state, *values)
        return result[0] if len(result) == 1 else result


class TorchPipeline:
    """Two ranks over gloo, forward only, each micro-batch one sample. ``nan`` where it does not apply."""

    def __init__(self, name: str, pipe: Any, micro_batches: int = 32) -> None:
        self._processes: list[Any] = []
        edges = {edge.name: edge for edge in pipe.program.edges}
        if len(pipe.plan.stages) != 2 or set(edges) != {"host>0", "0>1", "1>host"}:
            return  # an input or a result of another stage: its schedules have no place for it
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        state = pipe._engine.state.current()
        for rank, module in enumerate(pipe.package.modules):
            here, there = context.Pipe()
            tensors = [state[n].detach().clone() for n in module.state]
            job = (rank, module.source, tensors, edges["host>0"].specs, edges["0>1"].specs)
            arguments = (there, f"file://{self._folder.name}/store", job, edges["1>host"].specs, micro_batches)
            process = context.Process(target=_rank, args=arguments, daemon=True)
            process.start()
            self._processes.append((process, here))
        try:
            if any(here.recv() != "ready" for _, here in self._processes):
                self.close()
        except EOFError:
            self.close()

    def run(self, seconds: float) -> float:
        """Samples a second, or nan."""
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

    def __enter__(self) -> TorchPipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rank(pipe: Connection, store: str, job: Any, out_specs: Any, micro_batches: int) -> None:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    try:
        rank, source, state, in_specs, mid_specs = job
        os.sched_setaffinity(0, [rank])
        torch.set_num_threads(1)
        torch.backends.mha.set_fastpath_enabled(False)
        dist.init_process_group("gloo", store, rank=rank, world_size=2)

        def like(specs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(torch.zeros(s.shape, dtype=s.torch_dtype) for s in specs)

        ins, outs = (in_specs, mid_specs) if rank == 0 else (mid_specs, out_specs)
        with torch.no_grad():
            stage = PipelineStage(
                _StageModule(source, rank, state),
                rank,
                2,
                torch.device("cpu"),
                input_args=like(ins),
                output_args=like(outs),
            )
            schedule = ScheduleGPipe(stage, micro_batches, loss_fn=None)
            batch = tuple(torch.cat([t] * micro_batches) for t in like(in_specs)) if rank == 0 else ()
            schedule.eval(*batch)
            pipe.send("ready")
            while True:
                seconds = pipe.recv()
                start = time.perf_counter()
                schedule.eval(*batch)
                once = time.perf_counter() - start
                times = torch.tensor([max(1, int(seconds / once))])
                dist.broadcast(times, 0)
                start = time.perf_counter()
                for _ in range(int(times)):
                    schedule.eval(*batch)
                dist.barrier()
                pipe.send(int(times) * micro_batches / (time.perf_counter() - start))
    except EOFError:
        return
    except Exception:
        pipe.send(traceback.format_exc())
