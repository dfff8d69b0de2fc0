"""The link between two hosts is cut in mid-step. The hosts are two network namespaces joined by a pair of virtual interfaces."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from support.hosts import ADDRESSES, LIMIT, cut, processes, start, two_hosts, wait

pytestmark = pytest.mark.world_size(1)
TIMEOUT = 6  # seconds, of the group

JOB = f"""
import datetime, sys, time, torch, torch.distributed as dist, syncbn
syncbn.init_process_group("gloo", timeout={LIMIT})
rank, group = dist.get_rank(), dist.new_group(timeout=datetime.timedelta(seconds={TIMEOUT}))
layer = syncbn.SyncBatchNorm(3, process_group=group)
layer.layer_name = "encoder.bn"
steps = 0
try:
    while True:
        began = time.time()
        layer(torch.randn(4, 3, 5, requires_grad=True)).sum().backward()
        steps += 1
        if steps == 10:
            open(f"{{sys.argv[1]}}/{{rank}}.steps", "w").close()
except BaseException as error:
    said = f"{{type(error).__name__}} after {{time.time() - began:.1f}} s: {{error}}"
    open(f"{{sys.argv[1]}}/{{rank}}.error", "w").write(said)
    raise
"""


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    with two_hosts() as names:
        yield names


def test_a_cut_link_ends_every_rank_with_an_error_that_names_its_layer(hosts, tmp_path, subprocess_env):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    agents = [start(host, address, 1, script, tmp_path, subprocess_env) for host, address in zip(hosts, ADDRESSES, strict=True)]
    wait(lambda: len(list(tmp_path.glob("*.steps"))) == 2, "the ranks do not train")
    cut(hosts[1])
    wait(lambda: all(agent.poll() is not None for agent in agents), "torchrun goes on")
    assert all(agent.returncode != 0 for agent in agents)
    assert [processes(host) for host in hosts] == [[], []]
    for rank in range(2):
        said = (tmp_path / f"{rank}.error").read_text()
        assert re.match(r'RuntimeError after [\d.]+ s: layer "encoder\.bn" \(SyncBatchNorm\(3\)\): ', said)
        assert re.search(r"could not complete its (forward|backward) exchange of 3 channels .*with the other ranks", said)
        assert f"rank {rank} of 2" in said
        assert float(said.split()[2]) < TIMEOUT + 4, said
