"""Reports versions and implementations, and whether the distributed layer matches a single process.

    python -m syncbn.check                                  in a single process
    torchrun --nproc-per-node 4 -m syncbn.check             with the ranks of a job; under mpirun and srun as well
    python -m syncbn.check --json

Exit status 0 if every error is within its bound on every rank, else 1. Rank 0 prints.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from . import environment, native
from ._torch_private import is_torchs_layer_replaced
from .comm import resolve
from .comm.exchange import LayerExchanges
from .comm.rendezvous import has_a_gpu_of_its_own, init_process_group
from .environment import rank_info
from .modules import SyncBatchNorm

# Relative to the largest magnitude: rounding of float64 sums; a few float32 roundings; one 16-bit rounding.
BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
CHANNELS = 16
AUTOLOAD = "syncbn_autoload:autoload"  # the entry point that torch calls


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m syncbn.check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--backend", help="of torch.distributed (default: nccl if each rank has a GPU of its own, else gloo)")
    args = parser.parse_args(arguments)

    launcher = rank_info().launcher  # read first: init_process_group sets torchrun's variables
    started = not dist.is_initialized()
    device = init_process_group(args.backend, timeout=60) if started else torch.device("cpu")
    try:
        milliseconds, path = time_exchanges(device)
        report: dict[str, Any] = {
            "versions": collect_versions(),
            "implementations": describe_implementations(),
            "ranks": {"launcher": launcher, "world_size": dist.get_world_size(), "backend": dist.get_backend()},
            "errors": {str(dtype).removeprefix("torch."): relative_error(dtype, device) for dtype in BOUNDS},
            "ms_per_collective": milliseconds,
            "exchange_path": path,
            "problems": describe_problems(),
        }
        report["ok"] = all(error <= BOUNDS[getattr(torch, name)] for name, error in report["errors"].items())
        if dist.get_rank() == 0:
            print(json.dumps(report, indent=1) if args.json else format_report(report), flush=True)
        return 0 if report["ok"] else 1
    finally:
        if started:
            dist.destroy_process_group()


def collect_versions() -> dict[str, str]:
    """Versions, devices, and the threads of a rank."""
    try:
        mpi = f"mpi4py {importlib.metadata.version('mpi4py')}"
    except importlib.metadata.PackageNotFoundError:
        mpi = "mpi4py is not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpus and dist.is_nccl_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "NCCL": nccl,
        "MPI": mpi,
        "GPUs": ", ".join(gpus) or "none",
        "threads": str(torch.get_num_threads()),
        "torch.nn": f"SyncBatchNorm is {'this package' if is_torchs_layer_replaced() else 'torch'}'s layer",
    }


def describe_implementations() -> dict[str, str]:
    """The implementation used on each device, for all four dtypes."""
    return {library.device: f"{'compiled kernels' if library.loaded else 'reference'}: {library.reason}" for library in native.status()}


def relative_error(dtype: torch.dtype, device: torch.device) -> float:
    """The greatest relative error that one training step has on any rank, against float64 batch normalization of the whole batch in one
    process. Rank r has r + 1 samples."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    counts = [r + 1 for r in range(world_size)]
    generator = torch.Generator().manual_seed(0)
    whole, dy = torch.randn(2, sum(counts), CHANNELS, 9, generator=generator, dtype=torch.float64).to(dtype)
    whole = whole * 2 + 5

    layer = SyncBatchNorm(CHANNELS, device=device, dtype=dtype)
    x = whole.split(counts)[rank].to(device).requires_grad_()
    y = layer(x)
    y.backward(dy.split(counts)[rank].to(device))

    exact = whole.double().requires_grad_()
    running_mean, running_var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    want = F.batch_norm(exact, running_mean, running_var, training=True, eps=layer.eps)
    want.backward(dy.double())
    assert x.grad is not None and exact.grad is not None
    assert layer.running_mean is not None and layer.running_var is not None
    y_want, dx_want = want.detach(), exact.grad
    triples = (  # (actual, expected, reference for the error's scale)
        (y.detach(), y_want.split(counts)[rank], y_want),
        (x.grad, dx_want.split(counts)[rank], dx_want),
        (layer.running_mean, running_mean, running_mean),
        (layer.running_var, running_var, running_var),
    )
    errors = torch.stack([(got.cpu().double() - right).abs().max() / scale.abs().max() for got, right, scale in triples])
    greatest = errors.nan_to_num(nan=torch.inf).max().to(device)  # the all-reduce's MAX can miss NaN
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.item()


def time_exchanges(device: torch.device, repeats: int = 20) -> tuple[float, str]:
    """(median milliseconds of exchanging two sums for each of 256 channels, how the ranks exchange and why). A single rank has none: 0."""
    comm = resolve()
    if comm.world_size == 1:
        return 0.0, "none: a single rank"
    exchange = LayerExchanges(comm, "check", torch.float32, "samples", 0.0, None)
    times = []
    for _ in range(repeats):
        tensor = torch.zeros(2 * 256 + 2, dtype=torch.float64, device=device)
        _wait(device)
        start = time.perf_counter()
        exchange.sum(tensor, "forward")
        _wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e3, exchange.way.path


def describe_problems() -> list[str]:
    """One sentence per problem, including the remedy."""
    problems = []
    here = rank_info()
    gpus, ranks = torch.cuda.device_count() if torch.cuda.is_available() else 0, here.local_world_size or 1
    for library in native.status():
        if not library.loaded and (library.device == "cpu" or gpus):
            problems.append(f"{library.device} runs the slower reference: {library.reason}.")
    if gpus and not has_a_gpu_of_its_own(here):
        shared = "a GPU" if gpus == 1 else f"{gpus} GPUs"
        problems.append(f"{ranks} ranks share {shared}: start at most one rank for each GPU, or stay with gloo.")
    if not gpus and dist.get_backend() == "nccl":
        problems.append("the backend is NCCL, but there is no GPU: pass backend='gloo'.")
    if ranks > 1 and environment.get("OMP_NUM_THREADS") is None:
        problems.append("OMP_NUM_THREADS is not set: each rank may use all cores; set it to the cores of a rank.")
    if gpus and "mpi4py" in sys.modules and not environment.settings.mpi_cuda_aware:
        problems.append("MPI exchanges go through host memory: with a CUDA-aware MPI set SYNCBN_MPI_CUDA_AWARE=1.")
    return problems + _replacement_problems()


def _replacement_problems() -> list[str]:
    """Why SYNCBN_REPLACE_TORCH=1 may have no effect in a process that does not import syncbn."""
    if not environment.settings.replace_torch:
        return []
    problems = []
    if environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        problems.append("TORCH_DEVICE_BACKEND_AUTOLOAD=0 makes torch ignore SYNCBN_REPLACE_TORCH=1: unset it, or import syncbn first.")
    if not any(point.value == AUTOLOAD for point in importlib.metadata.entry_points(group="torch.backends")):
        problems.append("torch ignores SYNCBN_REPLACE_TORCH=1, because syncbn is not installed with its entry point: reinstall it.")
    return problems


def format_report(report: dict[str, Any]) -> str:
    lines = [f"{name:<8} {value}" for name, value in (report["versions"] | report["implementations"]).items()]
    ranks = report["ranks"]
    lines.append(f"ranks    {ranks['world_size']}, launcher {ranks['launcher'] or 'none'}, over {ranks['backend']}")
    lines.append(f"exchange {report['exchange_path']}; median {report['ms_per_collective']:.3f} ms")
    for name, error in report["errors"].items():
        bound = BOUNDS[getattr(torch, name)]
        lines.append(f"{name:<8} differs from one process by {error:.1e}, allowed {bound:.0e}: {'ok' if error <= bound else 'WRONG'}")
    lines += [f"problem: {problem}" for problem in report["problems"]]
    lines.append("a layer on these ranks matches a single process" if report["ok"] else "THE LAYER IS WRONG ON THESE RANKS")
    return "\n".join(lines)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
