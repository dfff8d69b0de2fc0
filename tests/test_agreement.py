"""Ranks that disagree get an error on every rank, with what each was doing, instead of a hang or mixed-up statistics."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn as nn

import syncbn
from syncbn import RankMismatchError, SyncBatchNorm, agreement

several = pytest.mark.world_size(2, 3, 4)


def named(name: str, world, channels: int = 3, **options) -> SyncBatchNorm:
    layer = SyncBatchNorm(channels, process_group=world.group, **options)
    layer.layer_name = name
    return layer


def batch(channels: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, channels, 5, dtype=dtype)


DISAGREEMENTS = {  # name: (what rank 0 calls, what the others call, words of the message)
    "another layer": (("a", 3, torch.float32, {}), ("b", 3, torch.float32, {}), ["forward of a", "forward of b"]),
    "another C": (("a", 3, torch.float32, {}), ("a", 4, torch.float32, {}), ["7 numbers", "9 numbers"]),
    "another dtype": (("a", 3, torch.float32, {}), ("a", 3, torch.float64, {}), ["torch.float32", "torch.float64"]),
    "another eps": (("a", 3, torch.float32, {}), ("a", 3, torch.float32, {"eps": 0.1}), ["1e-05", "0.1"]),
    "another weighting": (("a", 3, torch.float32, {}), ("a", 3, torch.float32, {"weighting": "ranks"}), ["samples", "ranks"]),
}


@several
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_mismatch_raises_on_every_rank_and_says_who_does_what(world, name):
    first, others, words = DISAGREEMENTS[name]
    layer_name, channels, dtype, options = first if world.rank == 0 else others
    layer = named(layer_name, world, channels, dtype=dtype, **options)
    with pytest.raises(RankMismatchError) as error:
        layer(batch(channels, dtype))
    message = str(error.value)
    for word in words:
        assert word in message, message
    assert "rank 0:" in message
    assert ("rank 1:" if world.size == 2 else "ranks 1, 2") in message
    SyncBatchNorm(3, process_group=world.group)(batch())  # the ranks are in step again


@several
def test_a_skipped_layer_is_found_at_the_next_one(world):
    a, b = named("a", world), named("b", world)
    x = batch()
    with pytest.raises(RankMismatchError, match="forward of b"):
        if world.rank == 0:
            x = a(x)
        b(x)


@several
def test_backward_against_forward_is_found(world):
    a, b = named("a", world), named("b", world)
    y = a(batch().requires_grad_())
    with pytest.raises(RankMismatchError, match="backward of a"):
        if world.rank == 0:
            y.sum().backward()
        else:
            b(batch())


@several
def test_only_first_calls_compare(world, monkeypatch):
    compared = []
    original = agreement.compare
    monkeypatch.setattr(agreement, "compare", lambda comm, record, device: compared.append(record) or original(comm, record, device))
    layer = named("a", world)
    for _ in range(3):
        layer(batch().requires_grad_()).sum().backward()
    assert [record.split(",")[0] for record in compared] == ["forward of a", "backward of a"]
    copy.deepcopy(layer)(batch())  # a copy has agreed to nothing
    assert len(compared) == 3
    monkeypatch.setenv("SYNCBN_CHECK", "always")
    for _ in range(2):
        layer(batch())
        syncbn.sync_batch_norm(batch(), None, None, process_group=world.group)
    assert len(compared) == 7
    monkeypatch.setenv("SYNCBN_CHECK", "off")
    named("b", world)(batch())
    assert len(compared) == 7


@several
def test_always_finds_a_divergence_late_in_a_run(world, monkeypatch):
    monkeypatch.setenv("SYNCBN_CHECK", "always")
    a, b = named("a", world), named("b", world)
    for _ in range(3):
        b(a(batch()))
    with pytest.raises(RankMismatchError, match=r"rank 0: forward of b.*exchange \d+ of this group"):
        if world.rank == 0:
            a(b(batch()))
        else:
            b(a(batch()))
            b(batch())


def test_an_unknown_mode_is_named(world, monkeypatch):
    monkeypatch.setenv("SYNCBN_CHECK", "sometimes")
    if world.size == 1:
        SyncBatchNorm(3)(batch())  # alone there is nothing to check
    else:
        with pytest.raises(ValueError, match="SYNCBN_CHECK must be one of"):
            named("a", world)(batch())


def test_long_names_keep_both_ends():
    name = "encoder." + "x" * 400 + ".bn1, 7 numbers"
    decoded = agreement._decode(agreement._encode(name))
    assert decoded.startswith("encoder.") and decoded.endswith(".bn1, 7 numbers") and len(decoded) == agreement.BYTES


@several
def test_debug_logs_each_collective_with_the_layer(world, monkeypatch, caplog):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), world.group)
    monkeypatch.setenv("SYNCBN_DEBUG", "1")
    with caplog.at_level(logging.INFO, "syncbn"):
        model(batch().requires_grad_()).sum().backward()
    forward, backward = caplog.messages
    assert forward.startswith(f"rank {world.rank}  0  forward  7 x float64") and forward.endswith(" ms")
    assert backward.startswith(f"rank {world.rank}  0  backward  6 x float64")


@several
def test_profiles_show_the_layers(world):
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), world.group)
    with torch.profiler.profile() as profile:
        model(batch().requires_grad_()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"syncbn.forward 0", "syncbn.backward 0"} <= names
