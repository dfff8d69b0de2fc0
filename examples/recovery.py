"""Training that survives the death of a rank: torchrun restarts all ranks, which resume from the last checkpoint.

    RANKS=2 RESTARTS=3 launch/torchrun.sh examples/recovery.py

The run ends with the same weights and moving statistics as an undisturbed one, because a checkpoint contains everything on which a step
depends, and the random numbers of an epoch depend only on the epoch and the rank.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncbn


def save(path: Path, **state: object) -> None:
    """Replaces the file atomically: a crash while writing leaves the previous checkpoint intact."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def network() -> nn.Module:
    """Digits [N, 1, 8, 8] -> logits [N, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(256, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank (default: 8)")
    parser.add_argument("--checkpoint", type=Path, default=Path("out/recovery.pt"), help="a file on storage that all hosts share")
    args = parser.parse_args()

    device = syncbn.init_process_group()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = syncbn.convert_sync_batchnorm(network()).double().to(device)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    finished = 0
    if args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        finished = state["epochs"]
        if rank == 0:
            print(f"resumes after epoch {finished}", flush=True)

    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels))
    sampler = DistributedSampler(data)
    loader = DataLoader(data, args.batch_size, sampler=sampler, drop_last=True)
    for epoch in range(finished, args.epochs):
        sampler.set_epoch(epoch)  # the order of the images
        torch.manual_seed(epoch * world_size + rank)  # dropout, and augmentation if there were any
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(parallel(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
        if rank == 0:
            save(args.checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), epochs=epoch + 1)
            print(f"epoch {epoch + 1}  loss {loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
