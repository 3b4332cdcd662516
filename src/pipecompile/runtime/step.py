"""What a generated training step asks of the runtime: its link, and the generator that drives it."""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipecompile.errors import StepError
from pipecompile.ir.link import Port
from pipecompile.ir.program import Op
from pipecompile.runtime.batch_norm import BatchStatistics
from pipecompile.runtime.channels.ring import RingReceiver, RingSender
from pipecompile.runtime.lanes import remark
from pipecompile.runtime.step_spans import Spans

_STAGE = re.compile(r"(?:stage|forward|record|again|backward|backward_input|backward_weight)_(\d+)")
_MASK = (1 << 64) - 1


def mask_seed(seed: int, step: int, micro_batch: int, op: int) -> int:
    """Seed of one random operator: the same whatever the schedule, the stages or the process.

    Four rounds of SplitMix64 (Steele, Lea and Flood 2014), each fed the next of seed, step,
    micro-batch and the operator's number among the random ones of the model.
    """
    state = 0
    for part in (seed & _MASK, step, micro_batch, op):
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


class Sums:
    """Gradients of a device's weights, summed over micro-batches; None where there was none yet."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self._shapes: dict[str, torch.Tensor] = {}
        self._own: set[str] = set()

    def know(self, name: str, weight: torch.Tensor) -> None:
        """Say which weight a name means."""
        self._shapes[name] = weight

    def add(self, name: str, gradient: torch.Tensor | None) -> None:
        """Add one micro-batch. Not in place to the first, which may be a view of something still needed."""
        if gradient is None:
            return
        total = self.values.get(name)
        if total is None:
            self.values[name] = _held(gradient)
            self._own.discard(name)
        elif name in self._own and total.layout is gradient.layout is torch.strided:
            total.add_(gradient)
        else:  # torch adds what is sparse to what is dense, not the other way round
            sparse = total.layout is not torch.strided
            self.values[name] = gradient + total if sparse else total + gradient
            self._own.add(name)

    def receive(self, name: str, gradient: torch.Tensor) -> None:
        """Add what another device gives. It gives zero where it has none, and what nobody has stays none.

        An optimizer passes over a weight without a gradient, but decays one whose gradient is zero.
        """
        if name in self.values or bool(gradient.any()):
            self.add(name, gradient)

    def held(self) -> dict[str, torch.Tensor]:
        """The sums as they are; what is added later leaves them alone."""
        self._own.clear()
        return dict(self.values)

    def take(self, name: str) -> torch.Tensor:
        """Give the sum away (zero if there is none) and begin anew."""
        total = self.values.pop(name, None)
        return torch.zeros_like(self._shapes[name]) if total is None else total.to_dense()


def _held(gradient: torch.Tensor) -> torch.Tensor:
    """A copy of what lies in a ring slot, which is used again: autograd may hand its argument through.

    The indices of a sparse gradient are the input of its embedding.
    """
    own = gradient.layout is torch.strided and gradient.untyped_storage().resizable()
    return gradient if own else gradient.clone()


def generator_of(tensors: Mapping[str, torch.Tensor]) -> torch.Generator:
    """The one that random operators beside these weights draw from: the host's, or that of the card they lie on."""
    cards = {tensor.device.index for tensor in tensors.values() if tensor.is_cuda}
    return torch.cuda.default_generators[cards.pop()] if cards else torch.default_generator


class Draw:
    """What a stage gets for one micro-batch: seeds for its random operators, and room for statistics of BatchNorms."""

    def __init__(
        self,
        seed: int,
        step: int,
        micro_batch: int,
        statistics: dict[int, dict[int, BatchStatistics]],
        generator: torch.Generator,
    ) -> None:
        self._seed, self._step, self._micro_batch, self._statistics = seed, step, micro_batch, statistics
        self._manual_seed = generator.manual_seed

    def __call__(self, op: int) -> None:
        """Seed random operator number ``op``."""
        self._manual_seed(mask_seed(self._seed, self._step, self._micro_batch, op))

    def statistics(self, norm: int, x: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where BatchNorm number ``norm`` of input ``x`` puts its mean and variance. A second forward counts not."""
        mean, var = torch.zeros_like(like), torch.zeros_like(like)
        count = x.numel() // x.shape[1]
        self._statistics.setdefault(norm, {}).setdefault(self._micro_batch, BatchStatistics(count, mean, var))
        return mean, var


class NotFinite(Exception):
    """The loss of a micro-batch, or (-1) gradients of ``weights`` by placeholder name, are NaN or infinite."""

    def __init__(self, message: str, micro_batch: int = -1, weights: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.micro_batch, self.weights = micro_batch, weights


class Updates(Protocol):
    """The optimizers of a device, by stage."""

    @property
    def updated(self) -> bool:
        """Whether an update has begun in the step under way."""
        ...

    def norm(self, sums: Sums) -> Port:
        """A port that is ready once the norm over all devices is known."""
        ...

    def update(self, stage: int, sums: Sums) -> None:
        """Update the weights a stage owns, and forget their gradients."""
        ...


class StepLink:
    """The ``link`` of a generated training step: one device's tensors, ports, sums and updates.

    ``number`` counts steps over the whole training, ``parts`` the micro-batches of the one under way; ``losses``
    receives the value of each, weighted.
    ``written`` names the buffers that stages write to.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        ports: Sequence[RingReceiver | RingSender],
        updates: Updates,
        seed: int,
        written: Sequence[str] = (),
    ) -> None:
        self._tensors, self._updates, self._seed = tensors, updates, seed
        self._generator = generator_of(tensors)
        self._written = [tensors[name] for name in written]
        self._statistics: dict[int, dict[int, BatchStatistics]] = {}
        self._before: tuple[list[torch.Tensor], dict[str, torch.Tensor]] = ([], {})
        self._receivers = {port.edge: port for port in ports if isinstance(port, RingReceiver)}
        self._senders = {port.edge: port for port in ports if isinstance(port, RingSender)}
        self.sums = Sums()
        self.number = self.parts = 0
        self.losses: list[torch.Tensor] = []
        self.criterion: Callable[[int, Sequence[Any]], torch.Tensor] | None = None
        self.spans = Spans()

    def begin(self) -> None:
        """Note buffers and sums as they are before a step."""
        self._before = [buffer.clone() for buffer in self._written], self.sums.held()
        self.losses = []
        self._statistics.clear()
        self.spans.clear()

    def roll_back(self) -> None:
        """Put back what :meth:`begin` noted."""
        buffers, sums = self._before
        for buffer, value in zip(self._written, buffers, strict=False):
            buffer.copy_(value)
        self.sums.values = dict(sums)

    @property
    def updated(self) -> bool:
        """Whether weights may have been changed in the step under way."""
        return self._updates.updated

    def tensors(self, names: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Parameters, buffers and constants by placeholder name."""
        found = tuple(self._tensors[name] for name in names)
        for name, tensor in zip(names, found, strict=True):
            self.sums.know(name, tensor)
        return found

    def receiver(self, edge: str) -> RingReceiver:
        """The receiving end of the named edge."""
        return self._receivers[edge]

    def sender(self, edge: str) -> RingSender:
        """The sending end of the named edge."""
        return self._senders[edge]

    def draw(self, micro_batch: int) -> Draw:
        """What seeds the random operators of a micro-batch, by number."""
        return Draw(self._seed, self.number, micro_batch, self._statistics, self._generator)

    def commit(self, norms: Sequence[tuple[int, str, str, float]], counters: Sequence[str]) -> None:
        """Update the running statistics of deferred BatchNorms, once a step; see :class:`BatchStatistics`."""
        for norm, mean, var, momentum in norms:
            parts = self._statistics.pop(norm)
            BatchStatistics.of(list(parts.values())).update(self._tensors[mean], self._tensors[var], momentum)
        for name in counters:
            self._tensors[name].add_(1)

    def loss(self, micro_batch: int) -> Callable[..., torch.Tensor]:
        """The loss of a micro-batch as a function of the model's results, weighted by its size."""
        criterion = self.criterion
        assert criterion is not None, "the device with the last stage is given the loss"

        def loss_of(*outputs: Any) -> torch.Tensor:
            value = criterion(micro_batch, outputs)
            self.losses.append(value.detach().clone())  # it may lie in a slot
            return value

        return loss_of

    def norm(self) -> Port:
        """See :class:`Updates`."""
        return self._updates.norm(self.sums)

    def update(self, stage: int) -> None:
        """See :class:`Updates`."""
        self.spans.timed(Op.STEP, stage, self._updates.update)(stage, self.sums)


@dataclass(frozen=True)
class Place:
    """Where in a generated module something was raised: stage, layer (or empty) and line."""

    stage: int
    layer: str
    line: str


def place(error: BaseException, filename: str, stages: Sequence[int]) -> Place:
    """The innermost frame of the module in a traceback, and the comment with the layer's name above it; or the loss."""
    stage, layer, line = (stages[0] if stages else -1), "", filename
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == filename:
            found = _STAGE.fullmatch(frame.f_code.co_name)
            stage = int(found[1]) if found else stage
            first = frame.f_code.co_firstlineno
            above = (linecache.getline(filename, i).strip() for i in range(number, first, -1))
            if found or frame.f_code.co_name == "step":
                layer = next((text.lstrip("# ") for text in above if text.startswith("#")), layer)
            text = linecache.getline(filename, number).strip()
            layer = "loss_fn" if "= loss_of(" in text else layer
            line = f"{filename}:{number}: {text}"
    return Place(stage, layer, line)


def step_error(error: BaseException, filename: str, device: int, stages: Sequence[int], done: str = "") -> StepError:
    """The exception of a device module in the model's own terms: stage, layer and generated line."""
    at = place(error, filename, stages)
    where = f" in {at.layer}" if at.layer else ""
    trace, reason = "".join(traceback.format_exception(error)), f"{error}{remark(error)}"
    if "_OpNamespace" in reason:
        reason += "; give compile() imports=[the module that registers this operator]"
    return StepError(
        f"stage {at.stage} on device {device} raised {type(error).__name__}{where}{done}: {reason}\n  at {at.line}\n\n"
        f"Traceback on the device:\n{trace}"
    )


__all__ = [
    "Draw",
    "NotFinite",
    "Place",
    "StepLink",
    "Sums",
    "Updates",
    "generator_of",
    "mask_seed",
    "place",
    "step_error",
]
