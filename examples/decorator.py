"""A small network whose class is decorated: its instances run as pipelines, its callers do not know.

It finds edges: two layers of fixed filters, then a mean, over crops of a photograph that slide from
left to right. The same class is tried plain and as a pipeline, and the results are compared.

    python examples/decorator.py [--samples 40]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch
from skimage.data import astronaut
from torch import Tensor, nn

import pipecompile


class Edges(nn.Module):
    """How strong the edges of a picture are, in eight directions."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(8) * torch.pi / 8
        slope = torch.tensor([-1.0, 0.0, 1.0])
        across = angles.cos()[:, None, None] * slope[None, None] + angles.sin()[:, None, None] * slope[None, :, None]
        self.smooth = nn.AvgPool2d(3, stride=1)
        self.find = nn.Conv2d(1, 8, 3, bias=False)
        self.mix = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        with torch.no_grad():
            self.find.weight.copy_(across[:, None])
            self.mix.weight.fill_(1 / 25)

    def forward(self, picture: Tensor) -> Tensor:
        grey = self.smooth(picture.mean(1, keepdim=True))
        return torch.relu(self.mix(self.find(grey).abs())).mean((2, 3))


@pipecompile.pipeline(devices=2)
class PipelinedEdges(Edges):
    """The same, on two cores."""


def crops(count: int) -> Iterator[Tensor]:
    picture = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
    for i in range(count):
        left = 6 * i % 320
        yield picture[:, :, 160:352, left : left + 192].contiguous()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=40)
    count = parser.parse_args().samples
    torch.set_num_threads(1)
    plain, net = Edges().eval(), PipelinedEdges().eval()
    net.load_state_dict(plain.state_dict())  # still the same names
    with torch.no_grad():
        expected = [plain(crop) for crop in crops(count)]
        first = net(next(crops(1)))  # the first call compiles
        results = list(net.stream(crops(count)))
    print(net.pipeline)
    print(
        f"still an Edges: {isinstance(net, Edges)}; parameters: {', '.join(name for name, _ in net.named_parameters())}"
    )
    equal = torch.equal(first, expected[0]) and all(map(torch.equal, results, expected))
    print(f"{len(results)} results, {'every bit as' if equal else 'NOT as'} plain PyTorch gives them")
    strongest = int(torch.cat(results).mean(0).argmax())
    print(f"strongest edges: {strongest * 180 // 8} degrees")
    net.close()
    return 0 if equal and len(results) == count else 1


if __name__ == "__main__":
    sys.exit(main())
