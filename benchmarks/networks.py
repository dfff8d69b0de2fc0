"""The batch norm layers of four networks: (shape, what follows: "", "relu" or "add relu") -> how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

Layers = Counter[tuple[tuple[int, ...], str]]


def half(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple((s + 1) // 2 for s in size)


def resnet(n: int, size: tuple[int, int], blocks: tuple[int, ...], strides: tuple[int, ...] = (1, 2, 2, 2)) -> Layers:
    """torchvision's bottleneck ResNet, the stride in the second convolution of a block."""
    layers: Layers = Counter()
    size = half(size)
    layers[(n, 64, *size), "relu"] += 1
    size = half(size)
    for stage, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
        c = 64 << stage
        layers[(n, c, *size), "relu"] += 1
        size = half(size) if stride == 2 else size
        layers[(n, 4 * c, *size), ""] += 1  # in the shortcut
        layers[(n, c, *size), "relu"] += 2 * count - 1
        layers[(n, 4 * c, *size), "add relu"] += count
    return layers


def mask_rcnn(n: int) -> Layers:
    layers = resnet(n, (800, 1344), (3, 4, 6, 3))
    for level in range(4):  # of the feature pyramid: each has a lateral and an output layer
        layers[(n, 256, 200 >> level, 336 >> level), ""] += 2
    return layers


def deeplab(n: int) -> Layers:
    layers = resnet(n, (769, 769), (3, 4, 23, 3), strides=(1, 2, 1, 1))
    layers[(n, 256, 97, 97), "relu"] += 6  # four branches of the pyramid, its projection and the head
    layers[(n, 256, 1, 1), "relu"] += 1  # the pooled branch
    return layers


def unet(n: int) -> Layers:
    layers: Layers = Counter()
    for level, c in enumerate((32, 64, 128, 256, 320, 320)):
        layers[(n, c, *(128 >> level,) * 3), "relu"] += 4 if level < 5 else 2
    return layers


NETWORKS: dict[str, Callable[[], Layers]] = {
    "ResNet-50 224², batch 2": lambda: resnet(2, (224, 224), (3, 4, 6, 3)),
    "ResNet-50 224², batch 32": lambda: resnet(32, (224, 224), (3, 4, 6, 3)),
    "Mask R-CNN R50-FPN 800x1344, batch 2": lambda: mask_rcnn(2),
    "DeepLabV3-R101 769², batch 2": lambda: deeplab(2),
    "3-D U-Net 128³, batch 2": lambda: unet(2),
}
