"""What the programs in benchmarks/ compute, as far as a machine without a GPU can tell."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("rich", reason="the benchmark prints tables")

from benchmarks import cases, exchange, host, launches, memory, timing
from syncbn import ops
from syncbn.comm.exchange import LayerExchanges

pytestmark = pytest.mark.world_size(1)


@pytest.fixture
def inputs():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield cases.Inputs((2, 8, 2, 2), "contiguous float32", "cpu")
    dist.destroy_process_group()


def test_the_host_time_of_a_layer_is_split_into_its_parts(inputs):
    """A layer has four ops, two tickets and two exchanges: host_split() counts them. Afterwards nothing is timed any more."""
    before = (ops.stats, LayerExchanges.all_reduce_)
    (row,) = host.host_split(inputs, repeats=3, calls=5)
    wholes, parts = ("exchanging", "alone", "BatchNorm2d"), ("tickets", "collectives", "around the collectives", "rest")
    assert set(row) == {"shape", *wholes, *host.OPS, *parts}
    assert row["shape"] == "(2, 8, 2, 2)" and all(row[name] > 0 for name in (*wholes, *host.OPS, *parts))
    assert (ops.stats, LayerExchanges.all_reduce_) == before


def test_a_call_that_the_layer_does_not_make_is_no_part_of_it(inputs, monkeypatch):
    """If the layer exchanged without `LayerExchanges`, the time of its exchanges would be counted as the rest: that is noticed."""
    monkeypatch.setattr(host, "LayerExchanges", type("Unused", (), {"all_reduce_": lambda: None, "ticket": lambda: None}))
    with pytest.raises(AssertionError, match="'stats': 5"):
        host.host_split(inputs, repeats=1, calls=5)


def test_a_clock_counts_nested_calls_of_a_name_once_and_gives_everything_back():
    class Base:
        def inner(self):
            return 1

    class Derived(Base):
        def outer(self):
            return self.inner() + 1

    clock = host.Clock()
    with clock.on(Derived, ["inner", "outer"], "all"):
        assert Derived().outer() == 2 and Derived().inner() == 1
    assert clock.calls == {"all": 2}
    assert "inner" not in vars(Derived) and Derived().outer() == 2 and clock.calls == {"all": 2}


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_a_pair_is_compared_with_both_of_its_ops(layout, inputs):
    rows = [row for row in launches.pair_rows("cpu", 1, [((2, 8, 4, 4), "float32")]) if row["kind"].startswith(layout)]
    assert [row["ops"] for row in rows] == ["stats + normalize", "backward_reduce + backward_input"]
    for row in rows:
        assert row["same input / cold"] == pytest.approx(row["same input µs"] / row["cold µs"]) and row["cold µs"] > 0


def test_without_a_device_a_layer_launches_nothing(inputs):
    rows = launches.launch_rows("cpu")
    assert [row["layer"] for row in rows] == ["syncbn", "torch"]
    assert all(row["launches, forward"] == row["launches, backward"] == 0 for row in rows)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Graphs that run what they hold when it is captured. A replay takes 3 ms."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda g: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "clock", lambda call, device, times: 3.0)


def test_the_time_of_a_graph_is_shared_by_its_layers(fake_cuda):
    calls = []
    assert launches.graph_microseconds(lambda: calls.append(1), repeats=2, layers=20) == 150
    assert len(calls) == 3 + 20  # three before the capture


def test_a_layer_that_cannot_be_captured_has_its_reason_in_the_table(fake_cuda, inputs, monkeypatch):
    rows = launches.graph_rows("cpu", 1, [(2, 8, 4, 4)])
    assert [row["syncbn, µs"] for row in rows] == [150, 150]

    def refuse(graph):
        raise RuntimeError("operation not permitted\nwhen capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    rows = launches.graph_rows("cpu", 1, [(2, 8, 4, 4)])
    assert [row["torch, µs"] for row in rows] == ["operation not permitted"] * 2


def test_cudnn_is_called_as_torch_declares_it():
    """On meta tensors: without cuDNN its results have shapes only."""
    x, vector = torch.empty(2, 8, 4, 4, device="meta", dtype=torch.bfloat16), torch.empty(8, device="meta")
    calls = cases.cudnn_calls(x, x, vector, vector, vector)
    assert [call()[0].shape for call in calls.values()] == [x.shape] * 2 and len(calls) == 2


def test_with_processor_time_no_other_thread_computes(monkeypatch, capsys):
    """The time of other threads would not count."""
    pytest.importorskip("matplotlib", reason="the benchmark saves a plot")
    program = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(timing, "now", timing.now)  # restored afterwards
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        timing.use_processor_time()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    for others in (["--threads", "2", "--device", "cpu"], ["--device", "cuda"]):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--processor-time", *others])
        with pytest.raises(SystemExit):
            program.parse()
        assert "--processor-time measures one thread" in capsys.readouterr().err


def test_the_time_of_a_step_is_the_devices(monkeypatch):
    """On a GPU a step has not ended when its backward pass returns."""
    monkeypatch.setattr(timing, "clock", lambda call, device, times: {"cuda": 7.0}[device])
    (row,) = memory.measure("a network", {"BatchNorm2d": lambda: torch.ones(2, requires_grad=True).sum()}, 1, "cuda")
    assert row["step, ms"] == 7


def test_a_card_without_nvidia_smi_has_the_reason_for_its_clocks(monkeypatch):
    assert timing.clocks("cpu", "before") == {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="b5-1"))
    monkeypatch.setenv("PATH", "")
    ((when, reading),) = timing.clocks("cuda", "before").items()
    assert when.endswith("before") and "nvidia-smi" in reading


def test_the_clocks_are_those_of_the_card_that_cuda_uses(monkeypatch, tmp_path):
    """With CUDA_VISIBLE_DEVICES=1 CUDA's number 0 is nvidia-smi's number 1."""
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="b5-1"))
    assert "--id=GPU-b5-1" in timing.clocks("cuda", "before").popitem()[1].split()


@pytest.mark.parametrize("runs", [1, 2])
def test_every_section_is_printed_once_and_saved(runs, tmp_path, monkeypatch, capsys):
    """python -m benchmarks, on one small shape."""
    pytest.importorskip("matplotlib", reason="the benchmark saves a plot")
    program = importlib.import_module("benchmarks.__main__")
    for name, value in {"SHAPES": [(2, 8, 4, 4)], "copy_rate": lambda device, repeats: 10.0, "keep_memory": lambda: None}.items():
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(program, "host_microseconds", lambda calls, device: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(program, "medians", lambda calls, device, repeats, **_: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--device", "cpu", "--quick", "--runs", str(runs), "--out", str(tmp_path)])
    program.main()
    (saved,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    titles = ["machine", "ops", "layers", "host and memory", "ops, times torch", "summary"]
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line in titles] == titles
    assert all(saved[title] for title in titles[1:]) and saved["runs"] == runs and saved["networks"] == []
    assert all(row["least"] <= row["value"] <= row["greatest"] for row in saved["summary"])


def test_the_figures_of_exchanges_are_written_to_a_folder_that_does_not_exist_yet(monkeypatch, tmp_path):
    """They take minutes to measure, so they must not be lost."""
    for name in ("run", "ratios", "against_goals"):
        monkeypatch.setattr(exchange, name, lambda *args: [])
    monkeypatch.setattr(sys, "argv", ["exchange", "--out", str(tmp_path / "new" / "folder")])
    exchange.main()
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name.startswith("exchange-") and json.loads(path.read_text())["exchanges"] == []
