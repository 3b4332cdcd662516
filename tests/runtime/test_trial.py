"""Streams in real workers, to see which plan is faster: nothing of the model is touched, nothing is left."""

from __future__ import annotations

import torch

from pipecompile.runtime.trial import leads, stream_rates
from replicated import Net, compiled, net, samples


class Counting(Net):
    """Writes to a buffer, which a trial must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.add_(1)
        y, skip = super().forward(x)
        return y + self.seen, skip


def test_a_trial_touches_no_weight_and_gives_a_rate_for_each() -> None:
    torch.manual_seed(0)
    model = Counting().eval()
    x = samples(1)[0]
    with compiled(model, x, (1, 1)) as one, compiled(net(), x, (2,)) as two:
        tensors = dict(one._engine.state.current())
        where = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        (rate,) = stream_rates([one.package], tensors, [x], seconds=0.02)
        assert 10 < rate < 1e6
        assert {name: tensor.data_ptr() for name, tensor in tensors.items()} == where
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)
        assert model.seen.item() == 0
        rates = stream_rates([two.package, two.package], two._engine.state.current(), [x], seconds=0.02)
        assert len(rates) == 2
        assert all(10 < each < 1e6 for each in rates)


def test_a_lead_shows_in_every_turn_but_one() -> None:
    assert leads([[10.0, 11.0]] * 5)
    assert leads([[10.0, 11.0]] * 4 + [[10.0, 9.0]])
    assert not leads([[10.0, 11.0]] * 3 + [[10.0, 9.0]] * 2)
    assert not leads([[10.0, 10.1]] * 5)
