"""Updates of a device: one torch optimizer a stage, over the weights the stage owns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from pipecompile.ir.link import Port
from pipecompile.runtime.channels.ring import SampleFailed
from pipecompile.runtime.groups import ParameterGroups
from pipecompile.runtime.step import NotFinite, Sums

#: What a user gives: ``functools.partial(torch.optim.SGD, lr=0.1)``, called with a list of parameters, or of
#: parameter groups where there are such.
OptimizerFactory = Callable[[list[Any]], torch.optim.Optimizer]


def settings_of(factory: OptimizerFactory) -> frozenset[str]:
    """What a group of its optimizers can be told: ``lr`` and so on."""
    group = factory([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    return frozenset(group) - {"params"}


def copies_kept(factory: OptimizerFactory) -> float:
    """How many times training keeps a weight: itself, its gradient, and what the optimizer keeps after a step."""
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros_like(weight)
    optimizer = factory([weight])
    optimizer.step()
    kept = optimizer.state[weight].values()
    return 2.0 + sum(isinstance(value, torch.Tensor) and value.numel() >= weight.numel() for value in kept)


class Board(Protocol):
    """Where devices add up the squares of their gradients."""

    def offer(self, device: int, squares: float) -> Port:
        """Give one's own; the port yields the sum over all devices that update anything."""
        ...


class _Ready:
    """A port nobody has to wait for. ``index`` and ``sample`` are for the records of a worker."""

    index, sample = -1, -1

    def ready(self) -> bool:
        """Always."""
        return True

    def take(self) -> None:
        """Nothing."""


class _Norm:
    """Waits for the sum of squares, and makes a scale of it. Without ``clip`` it only has to be finite."""

    def __init__(self, port: Port, clip: float | None, finite: bool, use: Callable[[float], None]) -> None:
        self._port, self._clip, self._finite, self._use = port, clip, finite, use
        self.index, self.sample = -1, -1

    def ready(self) -> bool:
        """Whether all devices have offered theirs."""
        return self._port.ready()

    def take(self) -> None:
        """As ``torch.nn.utils.clip_grad_norm_`` does: scale by max_norm / (norm + 1e-6) where that is below 1.

        Raises:
            SampleFailed: if the norm is not finite and has to be: some device says why.
        """
        norm = self._port.take() ** 0.5
        if self._finite and not math.isfinite(norm):
            raise SampleFailed(-1)
        if self._clip is not None:
            self._use(min(1.0, self._clip / (norm + 1e-6)))


class _Refused:
    """Waits as the other devices do, then raises."""

    def __init__(self, port: Port, weights: tuple[str, ...]) -> None:
        self._port, self._weights = port, weights
        self.index, self.sample = -1, -1

    def ready(self) -> bool:
        """As the norm is."""
        return self._port.ready()

    def take(self) -> None:
        """Say which gradients are not finite."""
        with contextlib.suppress(SampleFailed):
            self._port.take()
        raise NotFinite("gradients are NaN or infinite", weights=self._weights)


class DeviceUpdates:
    """Implements :class:`pipecompile.runtime.step.Updates` for one device.

    ``apply`` and ``clip`` are those of the step under way; ``scale`` follows from the norm. With
    ``finite`` nothing is updated anywhere when a gradient somewhere is NaN or infinite.
    """

    def __init__(
        self,
        device: int,
        owned: Mapping[int, Sequence[str]],
        tensors: Mapping[str, torch.Tensor],
        factory: OptimizerFactory,
        board: Board,
        *,
        finite: bool = False,
        keep: bool = False,
        groups: ParameterGroups = ParameterGroups(),  # noqa: B008 - frozen
    ) -> None:
        self._device, self._tensors, self._board, self._finite = device, tensors, board, finite
        self.updated = False
        self.owned = {stage: tuple(names) for stage, names in owned.items() if names}
        self._groups = {stage: groups.of(names) for stage, names in self.owned.items()}
        self.optimizers = {stage: factory(groups.given(parts, tensors)) for stage, parts in self._groups.items()}
        self.apply, self.clip, self.scale = True, None, 1.0
        self._keep, self.latest = keep, dict[str, torch.Tensor]()

    def begin(self, apply: bool, clip: float | None) -> None:
        """Say what the step under way wants."""
        self.apply, self.clip, self.scale, self.updated = apply, clip, 1.0, False

    def norm(self, sums: Sums) -> Port:
        """See ``Updates``. Nothing to wait for unless gradients are clipped now, or have to be finite.

        Raises:
            NotFinite: naming those that are not and have to be; the other devices are told.
        """
        if not self.apply or (self.clip is None and not self._finite):
            return _Ready()
        own = {n: sums.values[n] for names in self.owned.values() for n in names if n in sums.values}
        squares = {name: float(g.to_dense().double().pow(2).sum()) for name, g in own.items()}
        port = _Norm(self._board.offer(self._device, sum(squares.values())), self.clip, self._finite, self._rescale)
        bad = tuple(name for name, square in squares.items() if not math.isfinite(square))
        return _Refused(port, bad) if self._finite and bad else port

    def _rescale(self, scale: float) -> None:
        self.scale = scale

    def update(self, stage: int, sums: Sums) -> None:
        """See ``Updates``."""
        if not self.apply:
            return
        names = self.owned[stage]
        self.updated = True
        for name in names:
            gradient = sums.values.pop(name, None)
            if gradient is not None and self.scale != 1.0:
                gradient = gradient * self.scale
            self._tensors[name].grad = gradient
            if self._keep and gradient is not None:
                self.latest[name] = gradient
        self.optimizers[stage].step()
        for name in names:
            self._tensors[name].grad = None

    def state(self) -> dict[str, dict[str, Any]]:
        """Placeholder name -> the optimizer's state of that weight."""
        found: dict[str, dict[str, Any]] = {}
        for stage in self.owned:
            packed = self.optimizers[stage].state_dict()["state"]
            found.update({name: packed[i] for i, name in enumerate(self._order(stage)) if i in packed})
        return found

    def _order(self, stage: int) -> list[str]:
        """The weights of a stage as its optimizer counts them: group by group."""
        return [name for _, names in self._groups[stage] for name in names]

    def groups(self) -> dict[str, dict[str, Any]]:
        """Placeholder name -> the settings of its parameter group (learning rate and so on)."""
        found: dict[str, dict[str, Any]] = {}
        for stage in self.owned:
            names = self._order(stage)
            for group in self.optimizers[stage].state_dict()["param_groups"]:
                settings = {key: value for key, value in group.items() if key != "params"}
                found.update({names[i]: settings for i in group["params"]})
        return found

    def load(self, state: Mapping[str, dict[str, Any]], settings: Sequence[Mapping[str, Any]] = ()) -> None:
        """Put back what :meth:`state` gave, and settings, one mapping a group; none leaves them as they are."""
        for stage in self.owned:
            packed = self.optimizers[stage].state_dict()
            packed["state"] = {i: state[name] for i, name in enumerate(self._order(stage)) if name in state}
            for (index, _), group in zip(self._groups[stage], packed["param_groups"], strict=True):
                group.update(settings[index] if settings else {})
            self.optimizers[stage].load_state_dict(packed)

    def set(self, settings: Mapping[str, Any], group: int | None = None) -> None:
        """Change settings such as the learning rate, of all groups or of one."""
        for stage, optimizer in self.optimizers.items():
            for (index, _), own in zip(self._groups[stage], optimizer.param_groups, strict=True):
                if group in (None, index):
                    own.update(settings)


class Handover:
    """Implements :class:`pipecompile.runtime.step.Updates` where the caller has the optimizer.

    Gradients are copied to ``places`` (memory shared with the caller) where there are such.
    """

    def __init__(self, owned: Mapping[int, Sequence[str]], places: Mapping[str, torch.Tensor] | None = None) -> None:
        self._owned, self._places = owned, places
        self.updated = False
        self.latest: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Forget the gradients of the step before."""
        self.latest = {}

    def norm(self, sums: Sums) -> Port:
        """See ``Updates``: the caller may clip."""
        return _Ready()

    def update(self, stage: int, sums: Sums) -> None:
        """See ``Updates``: hand over; a weight that nothing depended on has no gradient."""
        for name in self._owned[stage]:
            gradient = sums.values.pop(name, None)
            if gradient is not None and self._places is not None:
                gradient = self._places[name].copy_(gradient.to_dense())
            if gradient is not None:
                self.latest[name] = gradient


class LocalBoard:
    """A board within one process."""

    def __init__(self, devices: Iterable[int]) -> None:
        self._devices = frozenset(devices)
        self._given: dict[int, float] = {}
        self._abandoned = False

    def reset(self) -> None:
        """Before a step."""
        self._given.clear()
        self._abandoned = False

    def abandon(self) -> None:
        """Let nobody wait for a device that will not come."""
        self._abandoned = True

    def offer(self, device: int, squares: float) -> Port:
        """See ``Board``."""
        self._given[device] = squares
        return self

    def ready(self) -> bool:
        """Whether all have given theirs, or one never will."""
        return self._abandoned or len(self._given) == len(self._devices)

    def take(self) -> float:
        """The sum, in the order of the devices.

        Raises:
            SampleFailed: if a device has failed.
        """
        if self._abandoned:
            raise SampleFailed(-1)
        return sum(self._given[device] for device in sorted(self._given))


__all__ = ["Board", "DeviceUpdates", "Handover", "LocalBoard", "OptimizerFactory", "copies_kept", "settings_of"]
