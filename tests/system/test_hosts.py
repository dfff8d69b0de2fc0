"""With several hosts, the ranks of each host sum in shared memory, and the first ranks add these sums over the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hosts import ADDRESSES, cut, processes, start, two_hosts, wait
from support.shared_memory import WHY_NOT
from syncbn.comm import shared_memory

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(shared_memory.library() is None, reason=WHY_NOT)]
TIMEOUT = 8  # seconds, of the group

START = f"""
import datetime, sys, time, torch, torch.distributed as dist, syncbn
from pathlib import Path
from syncbn.comm.identity import state_of
from syncbn.comm.sharing import Sharing
from syncbn.comm import resolve
torch.set_num_threads(1)
syncbn.init_process_group("gloo", timeout=90)
rank, group = dist.get_rank(), dist.new_group(timeout=datetime.timedelta(seconds={TIMEOUT}))
folder = Path(sys.argv[1])
def write(name, text):
    (folder / "part").with_name(f"{{name}}.{{rank}}.part").write_text(str(text))
    (folder / f"{{name}}.{{rank}}.part").rename(folder / f"{{name}}.{{rank}}")
def error_of(call):
    began = time.time()
    try:
        call()
    except Exception as error:
        return f"{{type(error).__name__}} after {{time.time() - began:.1f}} s: {{error}}"
    return ""
layer = syncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
layer.layer_name = "encoder.bn"
"""
SUMS = (
    START
    + """
import torch.nn as nn
plain = nn.BatchNorm2d(3, dtype=torch.float64)
for counts in ((3, 1, 4, 2), (0, 5, 0, 3), (0, 0, 7, 0)):
    whole = torch.randn(sum(counts), 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(counts))) + 100
    dy = torch.randn(whole.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine, exact = whole.split(counts)[rank].clone().requires_grad_(), whole.clone().requires_grad_()
    layer(mine).backward(dy.split(counts)[rank])
    plain(exact).backward(dy)
    torch.testing.assert_close(mine.grad, exact.grad.split(counts)[rank], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-9, atol=1e-9)
for tensor in (layer.running_mean, layer.running_var):
    others = [torch.empty_like(tensor) for _ in range(4)]
    dist.all_gather(others, tensor)
    assert all(torch.equal(other, tensor) for other in others)
write("path", state_of(resolve(group).group).way(Sharing).path)

other = syncbn.SyncBatchNorm(3, process_group=group, dtype=torch.float64)
other.layer_name = "decoder.bn"
x = torch.randn(4, 3, 2, dtype=torch.float64)
other(x)  # the first time, in which the ranks compare over the network
for odd in (3, 1, 0):  # the rank that differs
    write(f"mismatch {odd}", error_of(lambda: (other if rank == odd else layer)(x)))
    assert torch.isfinite(layer(x)).all()  # and the ranks go on together
dist.barrier()
dist.destroy_process_group()
"""
)
CUT = (
    SUMS
    + """
steps = 0
def train():
    global steps
    while True:
        layer(torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)).sum().backward()
        steps += 1
        if steps == 10:
            write("steps", steps)
write("error", error_of(train))
sys.exit(1)
"""
)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with two_hosts() as names:
        yield names


def launch(hosts: list[str], ranks: tuple[int, int], code: str, folder: Path, env: dict[str, str]) -> list:
    script = folder / "job.py"
    script.write_text(code)
    return [start(host, address, n, script, folder, env) for host, address, n in zip(hosts, ADDRESSES, ranks, strict=True)]


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("*.log"))


def assert_summed(folder: Path) -> None:
    for rank in range(4):
        assert (folder / f"path.{rank}").read_text() == "in shared memory on each of 2 hosts, whose first ranks use a group of their own"
        for odd in (3, 1, 0):
            said = (folder / f"mismatch {odd}.{rank}").read_text()
            assert said.startswith("RankMismatchError"), said
            assert f'rank {odd}: forward of layer "decoder.bn"' in said and 'forward of layer "encoder.bn"' in said, said


def test_hosts_sum_inside_then_over_the_network(hosts, tmp_path, subprocess_env):
    """One host has a single rank."""
    agents = launch(hosts, (1, 3), SUMS, tmp_path, subprocess_env)
    wait(lambda: all(agent.poll() is not None for agent in agents), "the ranks do not end")
    assert [agent.returncode for agent in agents] == [0, 0], logs(tmp_path)
    assert_summed(tmp_path)


def test_hosts_sum_until_a_cut_link_ends_every_rank_of_both(hosts, tmp_path, subprocess_env):
    """Two ranks on each host."""
    agents = launch(hosts, (2, 2), CUT, tmp_path, subprocess_env)
    steps = lambda: len(list(tmp_path.glob("steps.[0-3]")))  # noqa: E731
    wait(lambda: steps() == 4 or any(agent.poll() is not None for agent in agents), "the ranks do not train")
    assert steps() == 4, logs(tmp_path)
    assert_summed(tmp_path)
    cut(hosts[1])
    wait(lambda: all(agent.poll() is not None for agent in agents), "torchrun goes on")
    assert all(agent.returncode != 0 for agent in agents)
    assert [processes(host) for host in hosts] == [[], []]
    for rank in range(4):
        said = (tmp_path / f"error.{rank}").read_text()
        assert re.match(r"RuntimeError after [\d.]+ s: .*encoder\.bn.*", said), said
        assert float(said.split()[2]) < TIMEOUT + 10, said
        assert rank in (0, 2) or re.search(r"rank [02] gave up an exchange", said), said
