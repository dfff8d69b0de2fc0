"""Models that several tests use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from syncbn import SyncBatchNorm


class Doubling(SyncBatchNorm):
    """A user's subclass with a forward of its own."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return 2 * super().forward(input, residual) - 1


def two_norms(dimensions: int, channels: tuple[int, int, int], *last: nn.Module, kernel: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU, convolution, batch norm, and `last`; with the same weights at each call.

    Its input is [N, channels[0], *], with one or two dimensions after the channels. The batch norms are [1] and [4]."""
    torch.manual_seed(0)
    convolution, norm = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}[dimensions]
    first, middle, end = channels
    return nn.Sequential(convolution(first, middle, kernel), norm(middle), nn.ReLU(), convolution(middle, end, kernel), norm(end), *last)


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU called twice."""

    def __init__(self, c_in: int, c: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), norm(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), norm(c)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(c_in, c, 1, stride, bias=False), norm(c)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """[N, 3, 8, 8] -> [N, 10]; 9 batch norms, each after a convolution or a linear layer."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, norm1d: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())
        self.blocks = nn.Sequential(Block(8, 8, 1, norm), Block(8, 16, 2, norm), Block(16, 16, 1, norm))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(16 * 16, 12), norm1d(12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))
