"""Trains a small U-Net that finds a handwritten digit in images of any brightness and contrast, with two images per rank.

    torchrun --nproc-per-node 4 examples/segmentation.py --norm local     # each rank normalizes its two images
    torchrun --nproc-per-node 4 examples/segmentation.py --norm sync      # all ranks normalize the eight images together
    python examples/segmentation.py --norm local --batch-size 8           # one process with all eight
    python examples/segmentation.py --norm group --batch-size 8           # the same with GroupNorm, which needs no batch

The digits are scikit-learn's, each placed somewhere on an empty image with noise. The script runs under torchrun, mpirun or srun, and in a
single process. It computes in float64, so that runs differ by their method, not by rounding. `compare.py` makes a table and a picture of
the runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import syncbn

IMAGE, DIGIT = 16, 8  # pixels
TRAIN, ALL = 1400, 1797  # digits: the first are trained on, the rest is tested on
SHOWN = 6  # test images in the picture


class Scenes:
    """Images with one digit each, at any place, brightness and contrast; the masks say which pixels are the digit's."""

    def __init__(self, seed: int) -> None:
        images = torch.tensor(load_digits().images) / 16
        self.digits = images[torch.randperm(ALL, generator=Generator().manual_seed(seed))]

    def draw(self, which: Tensor, random: Generator) -> tuple[Tensor, Tensor]:
        """x [n, 1, 16, 16] float64 and its mask [n, 16, 16] of 0 and 1, of the digits `which` [n]."""
        n = len(which)
        x = torch.zeros(n, 1, IMAGE, IMAGE, dtype=torch.float64)
        corners = torch.randint(0, IMAGE - DIGIT + 1, (n, 2), generator=random).tolist()
        for image, digit, (row, column) in zip(x, self.digits[which], corners, strict=True):
            image[0, row : row + DIGIT, column : column + DIGIT] = digit
        mask = (x[:, 0] > 0.3).long()
        contrast = 0.3 + 1.4 * torch.rand(n, 1, 1, 1, generator=random, dtype=torch.float64)
        brightness = torch.randn(n, 1, 1, 1, generator=random, dtype=torch.float64)
        noise = 0.1 * torch.randn(x.shape, generator=random, dtype=torch.float64)
        return x * contrast + brightness + noise, mask


def block(channels: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class UNet(nn.Module):
    """Images [N, 1, H, W] -> logits [N, 2, H, W]; H and W are multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = block(1, 16), block(16, 32, 2), block(32, 32, 2)
        self.up2, self.up1, self.head = block(64, 32), block(48, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = F.interpolate(self.down3(b), scale_factor=2.0)
        d = F.interpolate(self.up2(torch.cat([c, b], 1)), scale_factor=2.0)
        return self.head(self.up1(torch.cat([d, a], 1)))


def with_group_norm(model: nn.Module) -> nn.Module:
    """Each BatchNorm2d of the model becomes a GroupNorm of 8 groups."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(8, child.num_features))
    return model


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, mask: Tensor) -> tuple[float, float, Tensor]:
    """(loss, intersection over union of the digit's pixels, predicted mask) of the model in eval mode."""
    model.eval()
    logits = model(x)
    model.train()
    predicted = logits.argmax(1)
    iou = (predicted & mask).sum() / (predicted | mask).sum().clamp(min=1)
    return F.cross_entropy(logits, mask).item(), iou.item(), predicted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=("sync", "local", "group"), default="sync")
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank (default: 2)")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the data (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    args = parser.parse_args()

    device = syncbn.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    scenes = Scenes(args.seed + 1)
    test_x, test_mask = (t.to(device) for t in scenes.draw(torch.arange(TRAIN, ALL), Generator().manual_seed(args.seed + 2)))
    torch.manual_seed(args.seed)
    model = with_group_norm(UNet()) if args.norm == "group" else UNet()
    if args.norm == "sync":
        model = syncbn.convert_sync_batchnorm(model)
    model = DistributedDataParallel(model.double().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    random = Generator().manual_seed(args.seed + 3)  # every rank draws the batch of all ranks and uses its share
    name = f"{args.norm}, {world_size} x {args.batch_size} images"
    train_losses, curve = [], []
    for step in tqdm(range(args.steps), desc=name, disable=rank > 0, unit="step"):
        if rank == 0 and step % 10 == 0:  # eval mode never communicates: one rank may do it without the others
            curve.append(evaluate(model.module, test_x, test_mask)[0])
        which = torch.randint(0, TRAIN, (world_size * args.batch_size,), generator=random)
        x, mask = (t.chunk(world_size)[rank].to(device) for t in scenes.draw(which, random))
        loss = F.cross_entropy(model(x), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        train_losses.append(loss.detach())
    late = torch.stack(train_losses[-50:]).mean()
    dist.all_reduce(late)
    # On every rank, to give gloo's thread time to release `late`: it may need the GIL, which is held while a group is destroyed.
    loss, iou, predicted = evaluate(model.module, test_x, test_mask)
    if rank == 0:
        result = {"norm": args.norm, "ranks": world_size, "batch_size": args.batch_size, "curve": [*curve, loss]}
        result |= {"train_loss": late.item() / world_size, "test_loss": loss, "iou": iou}
        result |= {"images": test_x[:SHOWN, 0].cpu(), "truth": test_mask[:SHOWN].cpu(), "predicted": predicted[:SHOWN].cpu()}
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(result, args.out / f"{args.norm}_{world_size}x{args.batch_size}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
