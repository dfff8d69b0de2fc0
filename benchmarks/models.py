"""Three networks to train, each of blocks that can be checkpointed one by one. Batch norms and activations are torch's until converted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import syncbn


def conv_bn_relu(before: int, width: int, size: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, width, size, stride, size // 2, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class Bottleneck(nn.Module):
    """ResNet-50's block (He et al. 2015), the stride in its second convolution. A synchronized layer gets the residual as well."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn_relu(before, width, 1), *conv_bn_relu(width, width, 3, stride), nn.Conv2d(width, 4 * width, 1, bias=False)
        )
        self.bn, self.relu = nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True)
        shortcut = [nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)]
        self.shortcut = nn.Sequential(*shortcut) if stride > 1 or before != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.bn, syncbn.SyncBatchNorm):
            self.bn.activation = "relu"
            return self.bn(self.body(x), self.shortcut(x))
        return self.relu(self.bn(self.body(x)).add_(self.shortcut(x)))


def resnet50() -> nn.Sequential:
    stem = nn.Sequential(*conv_bn_relu(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
    blocks: list[nn.Module] = []
    before = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for n in range(count):
            blocks.append(Bottleneck(before, width, 2 if n == 0 and width > 64 else 1))
            before = 4 * width
    return nn.Sequential(stem, *blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000)))


class Up(nn.Module):
    """The U-Net around an inner one: two convolutions before it and two after it, on twice its resolution."""

    def __init__(self, before: int, width: int, inner: nn.Module | None) -> None:
        super().__init__()
        self.down = nn.Sequential(*conv_bn_relu(before, width, 3), *conv_bn_relu(width, width, 3))
        self.inner, self.pool = inner, nn.MaxPool2d(2)
        self.up = nn.Sequential(*conv_bn_relu(3 * width, width, 3), *conv_bn_relu(width, width, 3)) if inner else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        if self.inner is None:
            return x
        inner = nn.functional.interpolate(self.inner(self.pool(x)), scale_factor=2)
        return self.up(torch.cat([x, inner], 1))


def unet() -> nn.Sequential:
    """Ronneberger et al. 2015, with padding and batch norms: five levels of 32 to 512 channels."""
    net: nn.Module | None = None
    for level in reversed(range(5)):
        net = Up(32 << (level - 1) if level else 3, 32 << level, net)
    assert net is not None
    return nn.Sequential(net, nn.Conv2d(32, 2, 1))


class Dense(nn.Module):
    """DenseNet-BC's layer (Huang et al. 2016): batch norms before the convolutions, the output appended to the input."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        first, second = (nn.BatchNorm2d(before), nn.ReLU(inplace=True)), (nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True))
        self.body = nn.Sequential(
            *first, nn.Conv2d(before, 4 * growth, 1, bias=False), *second, nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121() -> nn.Sequential:
    growth, width = 32, 64
    layers: list[nn.Module] = [nn.Sequential(*conv_bn_relu(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))]
    for stage, count in enumerate((6, 12, 24, 16)):
        for _ in range(count):
            layers.append(Dense(width, growth))
            width += growth
        if stage < 3:
            layers.append(
                nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2))
            )
            width //= 2
    head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))
    return nn.Sequential(*layers, head)
