"""Size and latency of a network before and after its batch norms are folded into the convolutions.

python examples/fold.py
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import syncbn


def network(width: int, depth: int) -> nn.Sequential:
    """[N, 3, H, W] -> [N, 10]"""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False), syncbn.SyncBatchNorm(width, activation="relu")]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@torch.inference_mode()
def milliseconds(models: dict[str, nn.Module], x: Tensor, repeats: int) -> dict[str, float]:
    """Median for each model. The models are interleaved, so that other load on the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    for i in tqdm(range(repeats + 3), desc="timing", leave=False):
        for name, model in models.items():
            synchronize()
            start = time.perf_counter()
            model(x)
            synchronize()
            if i >= 3:  # the first ones warm up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--image", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = network(args.width, args.depth).to(args.device)
    x = torch.randn(args.batch_size, 3, args.image, args.image, device=args.device)
    syncbn.update_bn_stats(model, [x])  # statistics as training would leave them
    models = {"before": model.eval(), "after": syncbn.fold_batchnorm(model)}
    times = milliseconds(models, x, args.repeats)
    table = Table("", "batch norms", "values in the state dict", "latency, ms (median)", title=f"input {list(x.shape)} on {args.device}")
    for name, m in models.items():
        norms = sum(isinstance(child, syncbn.SyncBatchNorm) for child in m.modules())
        table.add_row(name, str(norms), f"{sum(t.numel() for t in m.state_dict().values()):,}", f"{times[name]:.2f}")
    Console().print(table)
    with torch.inference_mode():
        want = model(x)
        error = (models["after"](x) - want).abs().max() / want.abs().max()
    print(f"largest difference of the outputs: {error.item():.1e} of the largest output")


if __name__ == "__main__":
    main()
