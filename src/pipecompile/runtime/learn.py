"""What a generated module that learns on a stream asks of the runtime: its link, whatever runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipecompile.ir.learning import LEARNED, PREDICTED, SKIPPED, Rule
from pipecompile.ir.package import DeviceModule
from pipecompile.ir.tree import Tree, unflatten
from pipecompile.runtime.channels.ring import RingReceiver, RingSender
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.learn_gradients import Gradients
from pipecompile.runtime.learn_sets import Tensors
from pipecompile.runtime.step import mask_seed
from pipecompile.runtime.update import DeviceUpdates, LocalBoard, OptimizerFactory
from pipecompile.runtime.versions import StageWeights

#: What a loss that is not finite does: no update from its sample, or an error.
OnNonfinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class LearnOptions:
    """What the devices need besides the package.

    ``scale_lr`` divides learning rates by 1 + delay, ``clip_norm`` is the largest norm of the gradients of a stage.
    """

    loss_fn: Callable[[Any, Any], Any]
    optimizer: OptimizerFactory
    seed: int = 0
    on_nonfinite: OnNonfinite = "stop"
    scale_lr: bool = False
    clip_norm: float | None = None


class LearnUpdates(DeviceUpdates):
    """The optimizers of a device that learns. Learning rates go in and out as given; ``shares`` scale them by stage."""

    def __init__(
        self,
        rule: Rule,
        stages: int,
        module: DeviceModule,
        owned: Mapping[int, tuple[str, ...]],
        tensors: Mapping[str, torch.Tensor],
        options: LearnOptions,
    ) -> None:
        mine = {stage: owned[stage] for stage in module.stages if stage in owned}
        super().__init__(module.device, mine, tensors, options.optimizer, LocalBoard([]))
        self._late = {stage: 1 + rule.delay(stage, stages) if options.scale_lr else 1 for stage in mine}
        for stage, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] / self._late[stage]

    def groups(self) -> dict[str, dict[str, Any]]:
        """As of a plain optimizer: with the learning rate that was given."""
        found = super().groups()
        for stage, names in self.owned.items():
            for name in names:
                found[name] = {**found[name], "lr": found[name]["lr"] * self._late[stage]}
        return found

    def set(self, settings: Mapping[str, Any], group: int | None = None) -> None:
        """Change settings of all groups, the learning rate by stage."""
        super().set(settings, group)
        if "lr" in settings:
            for stage, optimizer in self.optimizers.items():
                for own in optimizer.param_groups:
                    own["lr"] = settings["lr"] / self._late[stage]


class LearnLink:
    """The ``link`` of a generated module that learns. ``offset`` is the number of a sample less that of its message.

    ``further`` is for :class:`pipecompile.runtime.versions.StageWeights`.
    """

    def __init__(
        self,
        rule: Rule,
        stages: int,
        tensors: Mapping[str, torch.Tensor],
        ports: Sequence[RingReceiver | RingSender],
        updates: DeviceUpdates,
        options: LearnOptions,
        snapshot: Callable[[dict[str, Any]], None],
        mutated: Collection[str],
        further: tuple[Callable[[], Tensors], Any] | None = None,
    ) -> None:
        self._further = further
        self._rule, self._stages, self._tensors, self._updates = rule, stages, tensors, updates
        self._options = options
        self._mutated = mutated

        def numbered(part: dict[str, Any]) -> None:
            # Stages count messages, the caller counts samples.
            snapshot({**part, "sample": part["sample"] + self.offset})

        self._snapshot = numbered
        self._receivers = {port.edge: port for port in ports if isinstance(port, RingReceiver)}
        self._senders = {port.edge: port for port in ports if isinstance(port, RingSender)}
        self._weights: StageWeights | None = None
        self._version = 0
        self.offset = 0
        self.judge: Judge | None = None

    def weights(self, stage: int, state: Sequence[str], trained: Sequence[str]) -> StageWeights:
        """The weights of a stage; those of the stream before, where there was one."""
        if self._weights is None:
            skips = self._options.on_nonfinite == "skip"
            self._weights = StageWeights(
                self._rule, stage, self._stages, self._tensors, state, trained, self._updates, self._snapshot,
                gradients=Gradients(self._options.clip_norm, skip=skips), mutated=self._mutated, undo=skips,
                further=self._further,
            )  # fmt: skip
            self._weights.version = self._version
        self._weights.begin()
        return self._weights

    def settle(self) -> None:
        """See :meth:`StageWeights.settle`; for a stream that has failed."""
        if self._weights is not None:
            self._weights.settle()

    def left_out(self) -> int:
        """How many updates were not made since this was last asked, because their gradients were not finite."""
        return 0 if self._weights is None else self._weights.gradients.left_out()

    @property
    def version(self) -> int:
        """How many updates the weights have had."""
        return self._version if self._weights is None else self._weights.version

    @version.setter
    def version(self, value: int) -> None:
        self._version = value
        if self._weights is not None:
            self._weights.version = value

    def receiver(self, edge: str) -> RingReceiver:
        """The receiving end of the named edge."""
        return self._receivers[edge]

    def sender(self, edge: str) -> RingSender:
        """The sending end of the named edge."""
        return self._senders[edge]

    def draw(self, message: int) -> Callable[[int], None]:
        """What seeds the random operators of a sample, by number."""
        seed, sample, manual_seed = self._options.seed, message + self.offset, torch.default_generator.manual_seed

        def draw(op: int) -> None:
            manual_seed(mask_seed(seed, sample, 0, op))

        return draw

    def loss(self, message: int, target: Sequence[Any] | None) -> Callable[..., torch.Tensor | None]:
        """The loss of a sample as a function of the model's results; None without a target."""
        judge = self.judge
        assert judge is not None, "the device with the last stage is given the loss"
        return judge.loss_of(message + self.offset, target)

    def learns(self, message: int, loss: torch.Tensor | None) -> tuple[bool, torch.Tensor]:
        """Whether a sample makes an update, and what the caller is told of it."""
        judge = self.judge
        assert judge is not None, "the device with the last stage is given the loss"
        return judge.verdict(message + self.offset, loss)


class Judge:
    """The loss of each sample, in the last stage, and whether to learn from it."""

    def __init__(self, options: LearnOptions, out_tree: Tree, target: Tree | None) -> None:
        self._criterion, self._target = Criterion(options.loss_fn, out_tree), target
        self._on_nonfinite = options.on_nonfinite
        self._criterion.weights = (1.0,)

    def loss_of(self, sample: int, target: Sequence[Any] | None) -> Callable[..., torch.Tensor | None]:
        """See :meth:`LearnLink.loss`."""
        del sample

        def loss_of(*outputs: Any) -> torch.Tensor | None:
            if target is None or self._target is None:
                return None
            self._criterion.targets = (unflatten(self._target, list(target)),)
            return self._criterion(0, outputs)

        return loss_of

    def verdict(self, sample: int, loss: torch.Tensor | None) -> tuple[bool, torch.Tensor]:
        """See :meth:`LearnLink.learns`.

        Raises:
            FloatingPointError: for a loss that is not finite, unless such samples are skipped.
        """
        value = math.nan if loss is None else float(loss)
        status = PREDICTED if loss is None else LEARNED if math.isfinite(value) else SKIPPED
        if status == SKIPPED and self._on_nonfinite == "stop":
            raise FloatingPointError(
                f'the loss of sample {sample} is {value}: look at the sample, or compile with on_nonfinite="skip"'
            )
        return status == LEARNED, torch.tensor([status, value], dtype=torch.float64)


__all__ = ["Judge", "LearnLink", "LearnOptions", "LearnUpdates", "OnNonfinite"]
