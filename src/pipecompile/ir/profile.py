"""What was measured of a model: seconds per layer, bytes per value, the channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipecompile.ir.cluster import Link


@dataclass(frozen=True)
class Profile:
    """Costs of a :class:`~pipecompile.ir.graph.ModelGraph`, in its layer order.

    ``seconds[i]`` is the median time of layer ``i`` measured in its place in the whole model on
    one device; ``value_bytes`` the size of each value that crosses layers (user inputs too).
    ``total`` is the median time of the whole model, so that ``sum(seconds) ~ total``.
    """

    seconds: tuple[float, ...]
    value_bytes: dict[str, int]
    link: Link
    total: float
    repeats: int = 0
    digest: str = ""

    def scaled(self, factors: dict[int, float]) -> Profile:
        """The profile with the seconds of some layers multiplied, by layer index."""
        seconds = tuple(s * factors.get(i, 1.0) for i, s in enumerate(self.seconds))
        return Profile(seconds, self.value_bytes, self.link, self.total, self.repeats, self.digest)

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {**vars(self), "seconds": list(self.seconds), "link": vars(self.link)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Profile:
        """The inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {**data, "seconds": tuple(data["seconds"]), "link": Link(**data["link"])}
        return cls(**fields)
