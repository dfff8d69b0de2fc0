"""Ray Train: two workers train a small network, and their moving statistics are bitwise identical.

    python examples/ray_train.py

Needs `pip install 'ray[train]'`. Ray starts the workers and initializes torch.distributed; the script only converts the model before
`prepare_model`. On GPUs pass `use_gpu=True` to ScalingConfig.
"""

from __future__ import annotations

import argparse

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer, get_device, prepare_model
from torch import nn

import syncbn


def network() -> nn.Module:
    """[N, 3, H, W] -> [N, 8, H, W]"""
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())


def train(config: dict[str, int]) -> None:
    """Runs on each worker."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    model = prepare_model(syncbn.convert_sync_batchnorm(network()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)  # each worker has other images, of another brightness
    for _ in range(config["steps"]):
        optimizer.zero_grad()
        x = torch.randn(2, 3, 16, 16, device=get_device()) + rank
        model(x).square().mean().backward()
        optimizer.step()
    statistics = next(m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert statistics is not None
    of_workers = [torch.empty_like(statistics) for _ in range(dist.get_world_size())]
    dist.all_gather(of_workers, statistics)
    if rank == 0:
        identical = all(torch.equal(other, statistics) for other in of_workers)
        print(f"moving statistics of {len(of_workers)} workers are identical: {identical}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    scaling = ScalingConfig(num_workers=args.workers)
    TorchTrainer(train, train_loop_config={"steps": args.steps}, scaling_config=scaling).fit()


if __name__ == "__main__":
    main()
