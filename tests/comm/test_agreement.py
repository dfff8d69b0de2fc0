"""If ranks are about to exchange different things, every rank gets an error with what each was doing, not a hang or mixed-up statistics."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import syncbn
from support.divergence import another_group, named
from support.paths import over_the_group
from syncbn import RankMismatchError, SyncBatchNorm, environment
from syncbn.comm import agreement, debug, identity, resolve

several = pytest.mark.world_size(2, 3, 4)


def configure(monkeypatch, **values) -> None:
    """As if the environment had these values of `environment.Settings`."""
    monkeypatch.setattr(environment, "settings", environment.settings._replace(**values))


def batch(channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, channels, 5, dtype=dtype)


AGREED = {"name": "a", "channels": 3, "dtype": torch.float32, "eps": 1e-5, "weighting": "samples"}
DISAGREEMENTS = {  # of the other ranks with rank 0
    "layer": {"name": "b"},
    "C": {"channels": 4},
    "dtype": {"dtype": torch.float64},
    "eps": {"eps": 0.1},
    "weighting": {"weighting": "ranks"},
    "layer, C and dtype": {"name": "encoder.b", "channels": 7, "dtype": torch.bfloat16},
}


@several
def test_whole_numbers_agree_with_the_same_floats(world):
    layer = named("a", world, eps=1 if world.rank else 1.0)
    assert torch.isfinite(layer(batch())).all()


@several
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_a_mismatch_raises_on_every_rank_and_says_who_does_what(world, what):
    """For each rank the layer, its input's shape, which may differ by rank, and dtype."""
    calls = [AGREED | (DISAGREEMENTS[what] if rank else {}) for rank in range(world.size)]
    mine = dict(calls[world.rank])
    layer = named(mine.pop("name"), world, **mine)
    with pytest.raises(RankMismatchError) as error:
        layer(torch.randn(4 + world.rank, mine["channels"], 5, dtype=mine["dtype"]))
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + world.size
    for rank, (line, call) in enumerate(zip(lines[1:], calls, strict=True)):
        channels = call["channels"]
        what = f'layer "{call["name"]}", {channels} channels, {call["dtype"]}, weighting {call["weighting"]}, eps {call["eps"]}'
        details = (
            rf"SyncBatchNorm\({channels}\), input \[{4 + rank}, {channels}, 5\], the \d+(st|nd|rd|th) exchange since the group was made"
        )
        assert re.fullmatch(rf"  rank {rank}: forward of {what}, verification \d+ of this group; {details}", line), line
    SyncBatchNorm(3, process_group=world.group)(batch())  # the ranks are in step again


@several
def test_input_shapes_may_differ(world):
    y = named("a", world)(torch.randn(world.rank, 3, 5 - world.rank))
    assert y.shape == (world.rank, 3, 5 - world.rank)


@several
def test_agreeing_ranks_share_a_line(world):
    with pytest.raises(RankMismatchError) as error:
        named("a" if world.rank == 0 else "b", world)(batch())
    others = ", ".join(map(str, range(1, world.size)))
    assert str(error.value).splitlines()[2].startswith(f'  rank{"s" * (world.size > 2)} {others}: forward of layer "b", ')


@several
def test_a_skipped_layer_is_found_at_the_next_one(world):
    a, b = named("a", world), named("b", world)
    x = batch()
    with pytest.raises(RankMismatchError, match='forward of layer "b"'):
        if world.rank == 0:
            x = a(x)
        b(x)


KINDS = {  # the name of a kind of call, and the call; x has gone through a layer "a" and become y
    'forward of layer "b"': lambda world, x, y: named("b", world)(batch()),
    'backward of layer "a"': lambda world, x, y: y.sum().backward(),
    'double backward of layer "a"': lambda world, x, y: torch.autograd.grad(y.square().sum(), x, create_graph=True),
    "statistics of update_bn_stats": lambda world, x, y: syncbn.update_bn_stats(
        named("b", world), [batch()], process_group=world.group, progress=False
    ),
}


@several
@pytest.mark.parametrize("one, other", list(itertools.combinations(KINDS, 2)))
def test_mismatched_call_kind_is_detected(world, one, other):
    x = batch().requires_grad_()
    y = named("a", world)(x)
    with pytest.raises(RankMismatchError) as error:
        KINDS[one if world.rank == 0 else other](world, x, y)
    assert re.search(rf"rank 0: {one}, .*\n  ranks? 1.*: {other}, ", str(error.value))


@several
def test_a_rank_that_is_one_exchange_ahead_is_detected(world, group_only):
    """Rank 0 has verified once more than the others."""
    layer = named("a", world)
    layer.process_group = another_group(world)
    if world.rank == 0:
        identity.state_of(resolve(layer.process_group).group).verifications += 1
    with pytest.raises(RankMismatchError, match=r"rank 0: .* verification 2 of this group.*\n  ranks? 1.* verification 1 of this group"):
        layer(batch())
    free(layer.process_group)


@several
def test_ranks_compare_again_in_a_recreated_group(world, monkeypatch, group_only):
    """Nothing is remembered of a group that has been destroyed, though the next one may have its address."""
    compared = []
    original = agreement.verify
    monkeypatch.setattr(agreement, "verify", lambda *arguments: compared.append(arguments) or original(*arguments))
    layer = named("a", world)
    gc.collect()
    before = len(identity._states)
    for n in range(3):
        layer.process_group = another_group(world)
        for _ in range(2):
            layer(batch().requires_grad_()).sum().backward()
        assert len(compared) == 2 * (n + 1)
        compared[-1] = compared[-2] = None
        free(layer.process_group)
        layer.process_group = None
        gc.collect()
        assert not identity.record_of(layer).memberships and len(identity._states) == before


def free(group: object) -> None:
    if isinstance(group, torch.distributed.ProcessGroup):
        torch.distributed.destroy_process_group(group)
    else:
        group.Free()


@several
def test_reverting_and_reconverting_keeps_ranks_in_step(world):
    """One rank does this to export its model during training."""
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), world.group)
    for _ in range(2):
        model(batch().requires_grad_()).sum().backward()
        if world.rank == 0:
            torch.jit.script(syncbn.revert_sync_batchnorm(model))
            syncbn.convert_sync_batchnorm(model, world.group)


@dataclass(eq=False)
class Alone:
    """A communicator whose other ranks add nothing."""

    world_size: int
    rank: int = 0
    sent: list[torch.Tensor] = field(default_factory=list)

    @property
    def group(self) -> Alone:
        return self

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        self.sent.append(tensor)
        return tensor


@pytest.mark.world_size(1)
@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_agreement_message_never_has_the_size_of_a_layers_sums(ranks):
    """Otherwise it could be silently added to the sums of a layer that happens to have the same size."""
    comm = Alone(ranks)
    with pytest.raises(RankMismatchError):
        agreement.verify(comm, "forward of a", "", torch.device("cpu"))
    assert len(comm.sent) == 2 and all(tensor.nbytes % torch.float64.itemsize for tensor in comm.sent)


@several
def test_only_first_calls_compare(world, monkeypatch, group_only):
    compared = []
    original = agreement.verify
    monkeypatch.setattr(agreement, "verify", lambda comm, text, *more: compared.append(text) or original(comm, text, *more))
    layer = named("a", world)
    for _ in range(3):
        layer(batch().requires_grad_()).sum().backward()
    assert [text.split(",")[0] for text in compared] == ['forward of layer "a"', 'backward of layer "a"']
    copy.deepcopy(layer)(batch())  # a copy has verified nothing
    assert len(compared) == 3
    configure(monkeypatch, check="always")
    for _ in range(2):
        layer(batch())
        syncbn.sync_batch_norm(batch(), None, None, process_group=world.group)
    assert len(compared) == 7
    configure(monkeypatch, check="off")
    named("b", world)(batch())
    assert len(compared) == 7


@several
def test_always_finds_a_divergence_late_in_a_run(world, monkeypatch):
    configure(monkeypatch, check="always")
    a, b = named("a", world), named("b", world)
    for _ in range(3):
        b(a(batch()))
    with pytest.raises(RankMismatchError, match=r'rank 0: forward of layer "b".*verification \d+ of this group'):
        if world.rank == 0:
            a(b(batch()))
        else:
            b(a(batch()))
            b(batch())


@several
def test_debug_logs_each_collective_with_the_layer(world, monkeypatch, caplog, group_only):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), world.group)
    logging.getLogger("syncbn").setLevel(logging.WARNING)  # the variable is enough
    debug.log.cache_clear()
    configure(monkeypatch, debug=True)
    model(batch().requires_grad_()).sum().backward()
    compared, forward, compared_again, backward = caplog.messages
    assert [compared, compared_again] == [f"rank {world.rank}  0  {kind}  compared" for kind in ("forward", "backward")]
    assert forward.startswith(f"rank {world.rank}  0  forward  8 x float64") and forward.endswith(" ms")
    assert backward.startswith(f"rank {world.rank}  0  backward  6 x float64")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("capturing", [True, False])
def test_the_clock_of_the_log_waits_for_the_device_unless_a_graph_is_captured(monkeypatch, capturing):
    """To wait would invalidate the capture."""
    waits = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    debug.now(SimpleNamespace(is_cuda=True, device="cuda:0"))
    assert waits == ([] if capturing else ["cuda:0"])


@pytest.mark.process_group
@several
def test_a_mismatch_that_torchs_debug_level_detects_is_not_called_this_ranks_own(world, monkeypatch):
    """With TORCH_DISTRIBUTED_DEBUG=DETAIL torch compares the ranks before it starts a collective."""
    over_the_group(monkeypatch)
    level = torch.distributed.get_debug_level()
    torch.distributed.set_debug_level(torch.distributed.DebugLevel.DETAIL)
    try:
        group = another_group(world)
        with pytest.raises(RuntimeError, match=r"(?s)mismatch between collectives.*could not complete its forward exchange"):
            syncbn.sync_batch_norm(batch(5 if world.rank else 3), None, None, process_group=group)
    finally:
        torch.distributed.set_debug_level(level)


@several
def test_profiles_show_the_layers(world):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), world.group)
    with torch.profiler.profile() as profile:
        model(batch().requires_grad_()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"syncbn.forward 0", "syncbn.backward 0"} <= names
