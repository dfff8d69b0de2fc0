"""The blocks of a launch on an H100, of 132 multiprocessors: those that were fastest there (benchmarks/results/blocks-NVIDIA-H100.csv)."""

from __future__ import annotations

import subprocess

import pytest

from support import emulated

pytestmark = [
    pytest.mark.world_size(1),
    pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH"),
    pytest.mark.skipif(bool(emulated.PLANS), reason="the table is about the Plans of csrc/cuda/plans.cuh"),
]
SMS, RESIDENT = 132, 32


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """(threads of a block, blocks of a group, width of a tile, groups) for each (op, bytes of an element, outer, C, inner)."""
    program = tmp_path_factory.mktemp("launches") / "launches"
    emulated.build_program(emulated.EMULATION / "launches.cpp", program)

    def launch(*rows: tuple) -> list[tuple[int, ...]]:
        lines = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        done = subprocess.run([program, str(SMS)], input=lines, capture_output=True, text=True, check=True, timeout=60)
        return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]

    return launch


PLANES = [
    # op, bytes, (N, C, H * W) -> threads of a block, blocks of a channel
    ("stats", 2, (32, 64, 112 * 112), (256, 6)),
    ("stats", 2, (32, 256, 56 * 56), (128, 3)),  # one block for a channel would leave a third of the machine idle
    ("stats", 2, (32, 512, 28 * 28), (128, 1)),  # blocks of 256 would be a wave and a third
    ("stats", 2, (32, 1024, 14 * 14), (64, 1)),
    ("stats", 4, (32, 1024, 14 * 14), (32, 3)),
    ("stats", 2, (32, 2048, 7 * 7), (32, 1)),
    ("stats", 2, (2, 256, 56 * 56), (256, 1)),  # a warp has one step: to share a channel would cost more
    ("backward_reduce", 4, (32, 512, 28 * 28), (64, 3)),
    ("backward_reduce", 2, (32, 1024, 14 * 14), (64, 1)),
    ("normalize", 2, (32, 64, 112 * 112), (256, 8)),
    ("normalize", 2, (32, 1024, 14 * 14), (128, 1)),
    ("normalize", 2, (32, 2048, 7 * 7), (64, 1)),
    ("backward_input", 4, (2, 2048, 97 * 97), (256, 1)),  # nothing is added up: a second wave costs little, and blocks read longer rows
]


@pytest.mark.parametrize("op,bytes,shape,blocks", PLANES, ids=str)
def test_planes_get_the_blocks_that_were_fastest(launch, op, bytes, shape, blocks):
    ((threads, splits, *_),) = launch((op, bytes, *shape))
    assert (threads, splits) == blocks


COLUMNS = [
    # op, bytes, (N * H * W, C) -> width of a tile
    ("stats", 2, (32 * 56 * 56, 256), 8),
    ("stats", 2, (32 * 112 * 112, 64), 4),  # two tiles: half as many partial sums for the last block
    ("stats", 4, (2 * 128**3, 32), 8),  # a long walk gains more by whole memory lines
    ("normalize", 2, (32 * 112 * 112, 64), 8),  # no sums
]


@pytest.mark.parametrize("op,bytes,shape,width", COLUMNS, ids=str)
def test_columns_get_the_tile_that_was_fastest(launch, op, bytes, shape, width):
    assert launch((op, bytes, *shape, 1))[0][2] == width


def test_blocks_with_sums_are_resident_together_whatever_the_shape(launch):
    """The workspace has a counter for each group of two blocks or more, and space for the partial sums of all resident blocks."""
    layouts = [(n, inner) for n in (1, 3, 32, 500) for inner in (2, 49, 196, 9409)] + [(n, 1) for n in (1, 500, 100_000)]
    shapes = [(n, c, inner) for n, inner in layouts for c in (1, 7, 130, 400, 530, 900, 1600, 5000)]
    rows = [(op, bytes, *shape) for op in ("stats", "backward_reduce") for bytes in (2, 4) for shape in shapes]
    for row, (threads, splits, _, groups) in zip(rows, launch(*rows), strict=True):
        if splits > 1:
            assert groups * splits <= SMS * min(RESIDENT, 3 * 256 // threads), row
