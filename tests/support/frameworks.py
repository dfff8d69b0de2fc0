"""Parts of scripts that train on two ranks through a framework, and the law that their output obeys.

The ranks' data differ, so moving statistics that are bitwise identical on both ranks are those of both.
"""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from support.forks import ForkServer
from support.processes import run, torchrun, torchruns_variables

PROLOGUE = """
import atexit, os, sys, torch, zlib
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

try:
    import torchvision
except ModuleNotFoundError:
    pass
except (ImportError, RuntimeError):  # made for another build of torch: its operators are missing, and none is called here
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "roi_align", "roi_pool", "deform_conv2d", "ps_roi_align", "ps_roi_pool", "_roi_align_backward", "_roi_pool_backward"):
        library.define(f"{op}(Tensor x) -> Tensor")
    register = torch.library.register_fake
    torch.library.register_fake = lambda name, *a, **k: (lambda f: f) if name.startswith("torchvision::") else register(name, *a, **k)


@atexit.register
def end():  # without it torch 2.13 aborts now and then when the process ends, also with torch's own layers
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def data(rank):
    return torch.randn(4, 3, 8, 8) * (rank + 1) + rank


def train(model, rank, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(data(rank)).square().mean().backward()
        optimizer.step()


def report(model, rank, kind=nn.SyncBatchNorm):
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    bits = b"".join(t.detach().numpy().tobytes() for m in layers for t in (m.running_mean, m.running_var))
    kinds = all(isinstance(m, kind) for m in layers), all(m.running_mean.any() for m in layers)
    sys.stdout.write(f"rank {rank} {len(layers)} {all(kinds)} {zlib.crc32(bits)}\\n")
    sys.stdout.flush()
"""
TRAINER = """
import transformers
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x):
        return {"loss": self.net(x).square().mean()}
model = CONVERT(Model())
rank = int(os.environ["RANK"])
items = [{"x": x} for _ in range(2) for x in data(0)]
settings = dict(use_cpu=True, max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", disable_tqdm=True)
trainer = transformers.Trainer(model, transformers.TrainingArguments("out", **settings), train_dataset=items)
trainer.train()
"""
INIT = """
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
"""


def train(
    modules: Iterable[str], script: str, env: Mapping[str, str], forks: ForkServer, *, ranks: int = 2, starter: str = "forks"
) -> list[subprocess.CompletedProcess[str]]:
    """Runs PROLOGUE and `script` in the working directory, and returns the processes that it has started, after their end.

    `starter` says what starts the ranks: "torchrun", "forks", or "itself" if the script does. With "forks" each rank is returned, else one
    process. The test is skipped if one of the `modules` is not installed.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    file = Path("script.py").resolve()
    file.write_text(PROLOGUE + script)
    env = {**env, "RANKS": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
    if starter == "torchrun":
        return [run([*torchrun(ranks), str(file)], env=env, timeout=300)]
    return forks.run(file, env=env, timeout=300, ranks=torchruns_variables(ranks) if starter == "forks" else [{}])


def output(ended: Sequence[subprocess.CompletedProcess[str]]) -> str:
    return "".join(each.stdout + each.stderr for each in ended)


def assert_synchronized(ended: Sequence[subprocess.CompletedProcess[str]]) -> None:
    """Both ranks have reported layers of the right class, whose moving statistics are bitwise identical."""
    assert all(each.returncode == 0 for each in ended), output(ended)
    rows = sorted(line.split()[1:] for each in ended for line in each.stdout.splitlines() if line.startswith("rank "))
    assert [row[0] for row in rows] == ["0", "1"], output(ended)
    assert rows[0][1:] == rows[1][1:] and int(rows[0][1]) > 0 and rows[0][2] == "True", rows
