"""Trains a small ResNet on scikit-learn's handwritten digits, with two images a rank: too few for plain batch normalization.

    torchrun --nproc-per-node 4 examples/digits.py --norm sync       # BatchNorm over the batches of all ranks
    torchrun --nproc-per-node 4 examples/digits.py --norm local      # each rank by itself
    python examples/digits.py --norm local --batch-size 8            # one process with the whole batch

Runs under torchrun, mpirun or srun as well as alone. In float64, so that what differs is the method, not the rounding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

import syncbn


class Block(nn.Module):
    """y = relu(x' + BN(conv(relu(BN(conv(x)))))), x' = x or its projection."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out_channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet() -> nn.Module:
    """Digits [N, 1, 8, 8] -> logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def load(device: torch.device) -> tuple[TensorDataset, Tensor, Tensor]:
    """1440 images to train on; 357 images and their labels to test on."""
    digits = load_digits()
    images = torch.tensor(digits.images).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1440], labels[:1440]), images[1440:].to(device), labels[1440:].to(device)


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """(loss, accuracy) of the model in eval mode."""
    model.eval()
    logits = model(images)
    model.train()
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("sync", "local"), default="sync")
    parser.add_argument("--batch-size", type=int, default=2, help="images a rank (default: 2)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the curves (default: out)")
    args = parser.parse_args()

    device = syncbn.init_process_group()
    torch.manual_seed(0)
    model = resnet().double()
    if args.norm == "sync":
        model = syncbn.convert_sync_batchnorm(model)
    model = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)

    rank, world_size = dist.get_rank(), dist.get_world_size()
    data, test_images, test_labels = load(device)
    sampler = DistributedSampler(data, seed=0)  # with one seed, each step's images are the same however many ranks share them
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)
    name = f"{args.norm}, {world_size} x {args.batch_size} images"
    curve: list[tuple[int, float, float]] = []
    step, epoch = 0, 0
    with tqdm(total=args.steps, desc=name, disable=rank > 0, unit="step") as bar:
        while step < args.steps:
            sampler.set_epoch(epoch)
            for images, labels in loader:
                if rank == 0 and step % 20 == 0:  # eval mode never communicates: one rank may do it alone
                    curve.append((step, *evaluate(model.module, test_images, test_labels)))
                    bar.set_postfix(loss=f"{curve[-1][1]:.3f}", accuracy=f"{curve[-1][2]:.3f}")
                optimizer.zero_grad()
                F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
                optimizer.step()
                bar.update()
                step += 1
                if step == args.steps:
                    break
            epoch += 1
    if rank == 0:
        curve.append((step, *evaluate(model.module, test_images, test_labels)))
        args.out.mkdir(parents=True, exist_ok=True)
        run = {"name": name, "norm": args.norm, "ranks": world_size, "batch_size": args.batch_size, "curve": curve}
        (args.out / f"{args.norm}_{world_size}x{args.batch_size}.json").write_text(json.dumps(run))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
