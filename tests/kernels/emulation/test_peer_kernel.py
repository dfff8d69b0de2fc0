"""peer_all_reduce in the emulation: 2 to 16 ranks as blocks of one grid, and the mutants of its protocol."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
from pathlib import Path

import pytest
import torch

from support import emulated
from support.peers import CAPACITY, Ranks

pytestmark = [pytest.mark.world_size(1), pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")]

LENGTHS = [
    [1],
    [40, 40, 40, 40],
    [5, 40, 3, 64, 64, 1, 40],  # a value rests while others are exchanged
    [33] * 9,
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return emulated.build_peers(tmp_path_factory.mktemp("peers"))


@pytest.fixture(scope="module")
def ranks(library) -> Ranks:
    return Ranks(library)


def values(count: int, lengths: list[int], seed: int) -> list[list[torch.Tensor]]:
    """What each rank sends in each exchange: magnitudes that make the order of additions visible, or bits equal to its number's."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(-8, 9, (n,), generator=generator)  # noqa: E731
    return [[draw(n) if e % 3 else draw(n) * 0 + float(e + 1) * 5e-324 for e, n in enumerate(lengths)] for _ in range(count)]


def check_sums(ranks: Ranks, orders: int = 6) -> None:
    """Raises if some rank's sums are not those in the order of ranks, to the bit."""
    for seed in range(orders):
        for count in (2, 3, 4):
            for lengths in LENGTHS:
                sent = values(count, lengths, seed)
                received = ranks.exchange(sent, seed)
                assert received.missing == [0] * count
                for e in range(len(lengths)):
                    want = torch.zeros(lengths[e], dtype=torch.float64)
                    for rank in range(count):
                        want = want + sent[rank][e]
                    for rank in range(count):
                        assert torch.equal(received.values[rank][e], want), (seed, count, lengths, e, rank)


def check_missing(ranks: Ranks) -> None:
    """Raises unless all other ranks end, and name the one that leaves out an exchange, and the exchange."""
    for seed, count, absent in [(0, 2, 1), (1, 3, 0), (2, 4, 2)]:
        sent = values(count, [40] * 4, seed)
        sent[absent] = [part if e < 2 else part[:0] for e, part in enumerate(sent[absent])]
        received = ranks.exchange(sent, seed)
        named = received.missing[:absent] + received.missing[absent + 1 :]
        assert set(named) == {2 << 32 | (absent + 1)}, named
        for rank in set(range(count)) - {absent}:
            assert all(not part.isnan().any() for part in received.values[rank][:2])
            assert all(part.isnan().all() for part in received.values[rank][2:])
            assert set(received.numbers[rank][:40]) == {3} and received.numbers[rank][-1] == 1  # nothing was sent in the last exchange


def check_numbers_that_wrap(ranks: Ranks) -> None:
    sent = values(3, [20] * 6, 0)
    received = ranks.exchange(sent, 0, first_number=2**32 - 3)
    for e in range(6):
        assert torch.equal(received.values[1][e], 0 + sent[0][e] + sent[1][e] + sent[2][e])
    assert received.numbers[0][:20] == [3] * 20


def test_sums_are_those_in_the_order_of_ranks_however_their_words_arrive(ranks):
    check_sums(ranks)


def test_a_rank_that_does_not_come_is_named_with_the_exchange(ranks):
    check_missing(ranks)


def test_numbers_may_wrap(ranks):
    check_numbers_that_wrap(ranks)


def test_more_ranks_than_one_batch_of_loads(ranks):
    for count in (8, 9, 16):
        sent = values(count, [3, 3, 3], count)
        received = ranks.exchange(sent, count, threads=32)
        for e in range(3):
            want = torch.zeros(3, dtype=torch.float64)
            for rank in range(count):
                want = want + sent[rank][e]
            assert all(torch.equal(received.values[rank][e], want) for rank in range(count))


def test_the_launcher_refuses_what_has_no_place(ranks):
    assert ranks.refused(0) and ranks.refused(CAPACITY + 1)


MUTANTS = [
    ("words.y == number && words.w == number", "words.y == number"),
    ("words.y == number && words.w == number", "words.w == number"),
    ("words.y == number && words.w == number", "true"),
    ("int64_t{number & 1} * peers.ranks", "0 * peers.ranks"),
    ("peers.numbers[i] = number;", ""),
    ("peers.numbers[i] + 1", "1"),
    ("(turn + peers.rank) * peers.capacity + i, packed", "turn * peers.capacity + i, packed"),
    ("(turn + peers.rank) * peers.capacity + i, packed", "(turn + to) * peers.capacity + i, packed"),
    ("+ turn * peers.capacity + i;", "+ i;"),
    ("peers.rank + r < peers.ranks ?", "true ?"),
    ("r < peers.ranks && r != peers.rank ?", "r < peers.ranks ?"),
    (  # the order of additions
        "for (int u = 0; u < BATCH; ++u) {\n      const int r = first + u;\n      if (r >= peers.ranks)",
        "for (int u = BATCH - 1; u >= 0; --u) {\n      const int r = first + u;\n      if (r >= peers.ranks)",
    ),
    ("uint64_t{words.z} << 32 | words.x", "uint64_t{words.x} << 32 | words.z"),
    ("if (gave_up) return;", ""),
    ("peers.numbers[peers.capacity] = 1;", ""),
    ("uint64_t{exchange} << 32 |", ""),
    ("(rank + 1)", "(rank)"),
    ("return give_up(peers, r, exchange);", "give_up(peers, r, exchange);"),
    ("if (now > until) return false;", ""),
    ("until = now + patience", "until = now"),
    ("values[i] = __uint_as_float(0x7fc00000u);  // NaN", ""),
    ("first += BATCH", "first += peers.ranks"),
    ("if (r >= peers.ranks) continue;", ""),
]


def survives(path: Path) -> None:
    """Raises if a law does not hold. Ends after 10 s of processor time: a mutant may wait forever."""
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    ranks = Ranks(path)
    check_sums(ranks, 3)
    check_missing(ranks)
    check_numbers_that_wrap(ranks)
    test_more_ranks_than_one_batch_of_loads(ranks)


def is_noticed(path: Path) -> bool:
    child = multiprocessing.get_context("fork").Process(target=survives, args=(path,))
    child.start()
    child.join()
    return child.exitcode != 0


@pytest.mark.nightly
def test_the_unmodified_protocol_survives(library):
    assert not is_noticed(library)


@pytest.mark.nightly
@pytest.mark.parametrize(("old", "new"), MUTANTS)
def test_a_mutant_of_the_protocol_is_killed(library, tmp_path, old, new):
    kernels = shutil.copytree(emulated.KERNELS.parent, tmp_path / "csrc") / "cuda"
    text = (kernels / "peer_all_reduce.cuh").read_text()
    assert text.count(old) == 1, f"{old!r} is not once in peer_all_reduce.cuh"
    (kernels / "peer_all_reduce.cuh").write_text(text.replace(old, new))
    emulated.compile_peers(kernels, tmp_path / "mutant.o", "-O0")
    assert is_noticed(emulated.link(library.parent, {"peers": tmp_path / "mutant.o"}))
