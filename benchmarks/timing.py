"""Interleaved medians: the calls that are compared alternate, so that a busy machine slows all of them alike."""

from __future__ import annotations

import collections
import ctypes
import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

Calls = dict[str, Callable[[], object]]

now = time.perf_counter


def use_processor_time() -> None:
    """Makes `now` the processor time of this thread, without the time that other programs take, and without waits in which it sleeps. torch
    then uses this thread alone, because the time of others would not count."""
    global now
    now = time.thread_time
    torch.set_num_threads(1)


def keep_memory() -> None:
    """Freed memory stays with the process: the page faults of fresh memory cost more than a batch norm, and vary from call to call."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mmap_threshold, trim_threshold = -3, -1
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def clock(call: Callable[[], object], device: str, times: int, kernels_alone: bool = False) -> float:
    """Milliseconds of one of `times` calls, on a GPU those of the device. With `kernels_alone` the device first sleeps until the host has
    launched all calls, because small kernels take less time than their launches."""
    if device == "cuda":
        for cycles in (1 << 22, 1 << 24, 1 << 26) if kernels_alone else (0,):  # 2, 9, 40 ms
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if cycles:
                torch.cuda._sleep(cycles)
            start.record()
            for _ in range(times):
                call()
            end.record()
            slept_long_enough = not start.query()
            end.synchronize()
            if slept_long_enough or not kernels_alone:
                return start.elapsed_time(end) / times
        raise RuntimeError(f"the host needs more than 40 ms for {times} launches")
    begin = now()
    for _ in range(times):
        call()
    return (now() - begin) / times * 1e3


def medians(calls: Calls, device: str, repeats: int, sample_ms: float = 3.0, kernels_alone: bool = False) -> dict[str, float]:
    """Median milliseconds of each call. A sample is as many calls as take `sample_ms`, but at most 200; samples of all calls alternate."""
    for call in calls.values():
        clock(call, device, 2)
    # A GPU's queue of launches holds about a thousand, and a call may be several.
    times = {name: min(max(1, int(sample_ms / max(clock(call, device, 1), 1e-3))), 200) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(clock(call, device, times[name], kernels_alone))
    return {name: statistics.median(values) for name, values in samples.items()}


def rotated(calls: list[Calls]) -> Calls:
    """Each call takes the next of several inputs, and writes to other memory than the calls before it: only a cache that holds all of
    them makes it faster."""

    def turn(name: str) -> Callable[[], object]:
        several = itertools.cycle([each[name] for each in calls])
        kept: collections.deque = collections.deque(maxlen=len(calls) - 1)
        return lambda: kept.append(next(several)())

    return {name: turn(name) for name in calls[0]}


def host_microseconds(calls: Calls, device: str) -> dict[str, float]:
    """Median of what each call costs on the host: on a GPU, the time until it returns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(20):
        for name, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            begin = now()
            for _ in range(50):
                call()
            samples[name].append((now() - begin) / 50 * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def copy_rate(device: str, repeats: int) -> float:
    """GB/s of a copy that no cache holds, counting bytes read and written. The ops' rates are given as shares of it."""
    source = torch.ones(64 << 20 if device == "cpu" else 256 << 20, device=device)
    target = torch.empty_like(source)
    ms = medians({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * source.numel() * source.element_size() / ms / 1e6


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def clocks(device: str, when: str) -> dict[str, str]:
    """The card's current clocks and temperature from nvidia-smi; empty on the CPU."""
    if device != "cuda":
        return {}
    query = "clocks.sm,clocks.mem,temperature.gpu"
    card = f"GPU-{torch.cuda.get_device_properties().uuid}"  # nvidia-smi numbers cards in its own way, without CUDA_VISIBLE_DEVICES
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={card}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return {f"SM clock, memory clock, °C {when}": (done.stdout or done.stderr).strip()}
    except (OSError, subprocess.TimeoutExpired) as error:
        return {f"SM clock, memory clock, °C {when}": str(error)}
