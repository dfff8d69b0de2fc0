"""Sums in memory that the ranks of a host share: bitwise identical on every rank, and never a mixture."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
import torch

from support.shared_memory import TIMEOUT, WHY_NOT, gather, set_up
from syncbn.comm import shared_memory
from syncbn.comm.shared_memory import Forked, Mismatch, SharedExchangeError, SharedMemory
from syncbn.comm.signatures import digest_of as digest

pytestmark = [pytest.mark.world_size(2, 3, 4), pytest.mark.skipif(shared_memory.library() is None, reason=WHY_NOT)]
LENGTHS = (1, 5, 129, 1025, 8192, 8193, 20000)  # 8192 fill a slot


@pytest.fixture(params=["all read all", "by segments"])
def memory(request, world, monkeypatch) -> SharedMemory:
    monkeypatch.setattr(shared_memory, "ALL_READ_ALL", 8 if request.param == "all read all" else 1)
    return set_up(world)


def of_all(world, length: int, seed: int) -> torch.Tensor:
    """[rank, length]"""
    return torch.randn(world.size, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def in_rank_order(parts: torch.Tensor) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


@pytest.mark.parametrize("length", LENGTHS)
def test_the_sum_has_the_bits_of_an_addition_in_rank_order(world, memory, length):
    parts = of_all(world, length, seed=length)
    for _ in range(3):
        total = memory.all_reduce_(parts[world.rank].clone(), digest("sum"), TIMEOUT)
        assert torch.equal(total, in_rank_order(parts))


def test_three_thousand_exchanges_of_random_lengths_with_random_delays_are_right(world, memory):
    same, own = random.Random(1), random.Random(world.rank)
    for n in range(3_000):
        length = same.choice(LENGTHS[:4]) if same.random() < 0.99 else same.choice(LENGTHS)
        values = torch.full((length,), float(n * (world.rank + 1)), dtype=torch.float64)
        if own.random() < 0.02:
            time.sleep(own.random() * 2e-3)
        memory.all_reduce_(values, digest(f"exchange {n} of {length} {same.choice(('float32', 'float64', 'bfloat16'))}"), TIMEOUT)
        assert values[0] == values[-1] == n * world.size * (world.size + 1) // 2


def test_nothing_is_read_from_a_slot_before_it_is_written(world, memory):
    for n in range(20):
        gather(world, b"all ranks are between exchanges")
        memory.memory[shared_memory.slots_offset(world.size) :] = 0xFF  # NaN
        gather(world, b"all have poisoned them")
        length = LENGTHS[n % len(LENGTHS)]
        parts = of_all(world, length, seed=n)
        assert torch.equal(memory.all_reduce_(parts[world.rank].clone(), digest("sum"), TIMEOUT), in_rank_order(parts))


TAG = 2**20 - 1


def statistics(x: torch.Tensor) -> torch.Tensor:
    """[shift, sum, sumsq, weight, samples, tag, tag²] of x [samples, C] about its first row."""
    shift = x[0] if len(x) else torch.zeros(x.shape[1], dtype=torch.float64)
    d = x - shift
    return torch.cat([shift, d.sum(0), d.square().sum(0), torch.tensor([len(x), len(x), TAG, TAG**2]).double()])


@pytest.mark.parametrize("channels", [1, 64, 2729, 2730, 6000])  # 2729 fill a slot
@pytest.mark.parametrize("rows", [(4, 4, 4, 4), (0, 3, 0, 5), (7, 0, 1, 0), (0, 0, 0, 0)])
def test_statistics_about_different_shifts_are_those_of_the_whole_batch(world, memory, channels, rows):
    counts = rows[: world.size]
    x = torch.randn(sum(counts), channels, dtype=torch.float64) * torch.arange(1, channels + 1) + 1e9
    mine = world.mine(x, counts)
    stats = memory.all_reduce_(statistics(mine), digest("statistics"), TIMEOUT, channels)
    assert all(torch.equal(other, stats) for other in world.all_gather(stats))
    shift, sums, sumsq, weight = stats[:channels], stats[channels : 2 * channels], stats[2 * channels : -4], stats[-4]
    assert weight == stats[-3] == len(x)
    assert stats[-2:].tolist() == [world.size * TAG, world.size * TAG**2]
    if len(x):
        near_zero = x - 1e9  # exact
        torch.testing.assert_close(shift - 1e9 + sums / weight, near_zero.mean(0), rtol=1e-13, atol=1e-13 * channels)
        # Relative to the sum of squares about a value of the batch: each square is rounded a few times.
        error = sumsq - sums.square() / weight - (near_zero - near_zero.mean(0)).square().sum(0)
        assert (error.abs() <= 1e-13 * (x - x[0]).square().sum(0)).all()


def test_equal_weights_are_merged_by_the_weight_not_by_the_samples(world, memory):
    x = of_all(world, 12, seed=5)[world.rank].view(6, 2)
    stats = statistics(x)
    stats[2:6] /= 6
    stats[6] = 1
    memory.all_reduce_(stats, digest("statistics"), TIMEOUT, 2)
    means = torch.stack([part.view(6, 2).mean(0) for part in of_all(world, 12, seed=5)])
    torch.testing.assert_close(stats[:2] + stats[2:4] / stats[6], means.mean(0))
    assert stats[7] == 6 * world.size


DISAGREEMENTS = {  # (words, length, channels) of the last rank, where the others have ("a", 10, 0)
    "what they mean": ("b", 10, 0),
    "length": ("a", 9, 0),
    "number of pieces": ("a", 20000, 0),
    "sums and statistics": ("a", 10, 2),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_a_mismatch_is_found_on_every_rank_and_the_next_exchange_works(world, memory, name):
    for _ in range(2):
        words, length, channels = DISAGREEMENTS[name] if world.rank == world.size - 1 else ("a", 10, 0)
        values = torch.ones(length, dtype=torch.float64)
        with pytest.raises(Mismatch):
            memory.all_reduce_(values, digest(words), TIMEOUT, channels)
        assert torch.equal(values, torch.ones(length, dtype=torch.float64))  # nothing was added
        assert memory.all_reduce_(torch.ones(3).double(), digest("c"), TIMEOUT).tolist() == [world.size] * 3


def test_long_words_that_differ_in_the_middle_are_a_mismatch(world, memory):
    words = "x" * 400 + ("y" if world.rank == 0 else "z") + "x" * 400
    with pytest.raises(Mismatch):
        memory.all_reduce_(torch.ones(1).double(), digest(words), TIMEOUT)


def test_a_late_rank_is_named_after_the_timeout_and_hears_of_it(world, memory):
    if world.rank == 0:
        began = time.monotonic()
        with pytest.raises(SharedExchangeError, match=r"rank 1\b.*: not there yet, but alive, after 0.5 s"):
            memory.all_reduce_(torch.ones(1).double(), digest("a"), 0.5)
        assert time.monotonic() - began >= 0.5
    gather(world, b"rank 0 has given up")
    for _ in range(2):
        with pytest.raises(SharedExchangeError, match="rank 0.* gave up an exchange" if world.rank else "gave up an"):
            memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT)


@pytest.mark.world_size(3, 4)
def test_a_rank_that_waits_for_a_late_one_hears_of_another_that_gave_up(world, memory):
    if world.rank < world.size - 1:
        with pytest.raises(SharedExchangeError, match="rank 0.* gave up an exchange" if world.rank else "not there yet"):
            memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT if world.rank else 0.2)
    gather(world, b"the last rank never came")


def test_ctrl_c_ends_the_wait(world, memory):
    def interrupt(*_):
        raise KeyboardInterrupt

    if world.rank == 0:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT)
        signal.signal(signal.SIGALRM, before)
    gather(world, b"rank 0 was interrupted")
    with pytest.raises(SharedExchangeError, match="gave up"):
        memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT)


def test_a_signal_that_raises_nothing_does_not_end_the_wait(world, memory):
    heard = []
    if world.rank == 0:
        before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    else:
        time.sleep(0.5)
    assert memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT).item() == world.size
    if world.rank == 0:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        assert len(heard) > 2


def test_a_fork_gets_an_error(world, memory):
    memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT)
    child = os.fork()
    if child == 0:
        try:
            memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT)
        except Forked as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert memory.all_reduce_(torch.ones(1).double(), digest("a"), TIMEOUT).item() == world.size  # the parent goes on


def test_a_wait_may_be_without_end(world, memory):
    """As with SYNCBN_MPI_TIMEOUT=inf."""
    assert memory.all_reduce_(torch.ones(1).double(), digest("a"), float("inf")).item() == world.size


def test_exchanges_in_two_memories_may_alternate(world, memory):
    other = set_up(world)
    for n in range(200):
        one, two = torch.full((3,), float(n)).double(), torch.full((4,), float(-n)).double()
        memory.all_reduce_(one, digest("one"), TIMEOUT)
        other.all_reduce_(two, digest("two"), TIMEOUT)
        assert one[2] == n * world.size and two[3] == -n * world.size


def test_threads_of_a_rank_take_turns(world, memory):
    wrong = []

    def exchange() -> None:
        for _ in range(300):
            total = memory.all_reduce_(torch.ones(129).double(), digest("a"), TIMEOUT)
            if not torch.equal(total, torch.full((129,), float(world.size)).double()):
                wrong.append(total)

    threads = [threading.Thread(target=exchange) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_ranks_that_leave_a_core_may_use_the_same_cores_as_before(world, memory):
    cores = os.sched_getaffinity(0)
    for _ in range(20):
        os.sched_setaffinity(0, {min(cores)})  # the ranks meet on one core, and may then leave it
        os.sched_setaffinity(0, cores)
        for _ in range(20):
            memory.all_reduce_(torch.ones(3, dtype=torch.float64), digest("sum"), TIMEOUT)
        assert os.sched_getaffinity(0) == cores
