"""Convolutional models: skips, concatenations, norms, resampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.registry import Built, case, positional


def randomised(model: nn.Module) -> nn.Module:
    """Give BatchNorm layers statistics that are not 0 and 1, and convolutions weights that let signals through."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2.0)
    return model


def block(inputs: int, outputs: int, **options: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU in place."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, **options), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


@case("cnn_batchnorm", core=True)
def cnn_batchnorm() -> Built:
    model = nn.Sequential(
        block(3, 16),
        nn.MaxPool2d(2),
        block(16, 32),
        block(32, 32, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return randomised(model), positional(lambda: torch.randn(2, 3, 32, 32))


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.join2 = block(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.join1 = block(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        low = self.middle(F.max_pool2d(two, 2))
        two = self.join2(torch.cat([self.up2(low), two], 1))
        return self.head(self.join1(torch.cat([self.up1(two), one], 1)))


@case("unet", core=True, notes="skips over several stages")
def unet() -> Built:
    return randomised(UNet()), positional(lambda: torch.randn(1, 3, 32, 32))


class DenseNet(nn.Module):
    def __init__(self, layers: int = 6, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * (i + 1)), nn.ReLU(), nn.Conv2d(growth * (i + 1), growth, 3, padding=1)
            )
            for i in range(layers)
        )
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return self.head(torch.cat(made, 1).mean((2, 3)))


@case("densenet", core=True, notes="every layer reads all before it")
def densenet() -> Built:
    return randomised(DenseNet()), positional(lambda: torch.randn(2, 3, 16, 16))


class Inception(nn.Module):
    def __init__(self, inputs: int = 3, width: int = 8) -> None:
        super().__init__()
        self.one = block(inputs, width)
        self.two = nn.Sequential(block(inputs, width), block(width, width))
        self.three = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(inputs, width, 1))
        self.four = nn.Conv2d(inputs, width, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.two(x), self.three(x), self.four(x)], 1)


@case("inception", core=True, notes="parallel branches")
def inception() -> Built:
    model = nn.Sequential(
        Inception(), Inception(32), nn.MaxPool2d(2), Inception(32), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return randomised(model), positional(lambda: torch.randn(1, 3, 24, 24))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(3, 16, 4, 2, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.InstanceNorm2d(32)
        )
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(16, 12, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.decode(self.encode(x)), 2).sigmoid()


@case("groupnorm_transposed_pixelshuffle")
def autoencoder() -> Built:
    return Autoencoder(), positional(lambda: torch.randn(1, 3, 16, 16))


class Spatial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(1, 4, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 6))
        self.classify = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5))

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.locate(x).view(-1, 2, 3), list(x.shape), align_corners=False)
        return self.classify(F.grid_sample(x, grid, align_corners=False))


@case("grid_sample")
def spatial() -> Built:
    return Spatial(), positional(lambda: torch.randn(2, 1, 16, 16))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.deep = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)
        self.point = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm(self.deep(x)))
        gate = self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.point(y * gate)


@case("depthwise_squeeze_excite")
def squeeze_excite() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), *(SqueezeExcite() for _ in range(3)))
    return randomised(model), positional(lambda: torch.randn(1, 3, 32, 32))


@case("channels_last", notes="strides of input, weights and borders are kept")
def channels_last() -> Built:
    model = nn.Sequential(block(3, 16), block(16, 16), nn.MaxPool2d(2), block(16, 24), nn.Conv2d(24, 8, 1))
    model = randomised(model).to(memory_format=torch.channels_last)
    return model, positional(lambda: torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last))


class Upsampler(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, 2, 1) for i in range(3))
        self.sides = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        made = []
        for level in self.levels:
            x = F.gelu(level(x))
            made.append(x)
        top: Tensor | None = None
        results = []
        for feature, side in zip(reversed(made), reversed(list(self.sides)), strict=True):
            here = side(feature)
            if top is not None:
                here = here + F.interpolate(top, size=here.shape[-2:], mode="bilinear", align_corners=False)
            top = here
            results.append(here)
        return results


@case("feature_pyramid", notes="a list of results, backward skips, bilinear resize")
def feature_pyramid() -> Built:
    return Upsampler(), positional(lambda: torch.randn(1, 3, 32, 32))


class OneAndThree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(4, 8, 3, dilation=2), nn.BatchNorm1d(8), nn.PReLU(8), nn.MaxPool1d(2))
        self.cube = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.ELU(), nn.AdaptiveAvgPool3d(4), nn.Flatten(2))
        self.mix = nn.Linear(14 + 64, 6)

    def forward(self, line: Tensor, cube: Tensor) -> Tensor:
        return self.mix(torch.cat([self.line(line), self.cube(cube)], -1))


@case("conv1d_conv3d")
def one_and_three() -> Built:
    return randomised(OneAndThree()), positional(lambda: (torch.randn(2, 4, 32), torch.randn(2, 1, 8, 8, 8)))


class Residual(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.second = block(width, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x += self.second(self.first(x))
        return F.relu_(x)


@case("inplace_residual", core=True, notes="x += f(x) on a value that crosses layers")
def inplace_residual() -> Built:
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), *(Residual() for _ in range(4)))
    return randomised(model), positional(lambda: torch.randn(1, 3, 16, 16))


@case("dilated_reflect_pad")
def dilated() -> Built:
    model = nn.Sequential(
        nn.ReflectionPad2d(2),
        nn.Conv2d(3, 8, 3, dilation=2),
        nn.Mish(),
        nn.ZeroPad2d((1, 0, 1, 0)),
        nn.Conv2d(8, 8, 2, padding_mode="circular", padding=1),
        nn.LocalResponseNorm(3),
        nn.LPPool2d(2, 2),
        nn.Unfold(3),
        nn.Fold((8, 8), 3),
    )
    return model, positional(lambda: torch.randn(1, 3, 14, 14))
