"""The test machine of tests/simt: that it does what a card does, and that it sees what would be wrong on one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from simulator import CHECKOUT, KINDS, ORDERS, SOURCES, barriers, counting, fenced, order, probe, sanitized, without
from torch import Tensor


@pytest.fixture(params=ORDERS)
def turns(request: pytest.FixtureRequest) -> Iterator[str]:
    with order(request.param):
        yield request.param


def words(values: Tensor) -> np.ndarray:
    """The 16-bit words of a tensor."""
    return values.contiguous().view(torch.int16).numpy().view(np.uint16)


def line_of(text: str) -> int:
    """The line of probes.cuh in which a text stands."""
    lines = (SOURCES / "probes.cuh").read_text().splitlines()
    (found,) = [number for number, line in enumerate(lines, 1) if text in line]
    return found


# ---- who runs, and when


def test_a_thread_knows_who_it_is(turns: str) -> None:
    out = torch.full((6, 64, 6), -1, dtype=torch.int32)
    probe("identity", [out], blocks=6, threads=64, cluster=2)
    for block, thread in np.ndindex(6, 64):
        assert out[block, thread].tolist() == [block, thread, thread % 32, 6, 64, block % 2]


def in_turn(name: str, **how: int) -> list[int]:
    out = torch.full((4, 64), -1, dtype=torch.int32)
    with order(name):
        probe("turns", [out, torch.zeros(1, dtype=torch.int32)], blocks=4, threads=64, **how)
    return out.flatten().tolist()


@pytest.mark.parametrize("how", [{}, {"cluster": 2}, {"cooperative": True}], ids=str)
def test_turns_are_taken_in_the_order_that_was_asked_for(how: dict[str, int]) -> None:
    every = list(range(256))
    assert in_turn("forward", **how) == every
    assert in_turn("reverse", **how) == every[::-1]
    first, second = in_turn("random 1", **how), in_turn("random 2", **how)
    assert sorted(first) == sorted(second) == every
    assert len({tuple(turns) for turns in (every, every[::-1], first, second)}) == 4
    assert in_turn("random 1", **how) == first


def test_blocks_take_turns_at_random_too() -> None:
    turns = np.array(in_turn("random 1")).reshape(4, 64)
    assert [sorted(block // 64) for block in turns] == [[block[0] // 64] * 64 for block in turns]
    assert sorted(turns[:, 0] // 64) == [0, 1, 2, 3] != (turns[:, 0] // 64).tolist()


def test_shared_memory_is_nan_before_each_block(turns: str) -> None:
    for _ in range(2):
        out = torch.zeros(1000)
        probe("unset", [out], 1000, blocks=3, shared=4000)
        assert out.isnan().all()


# ---- fragments


DTYPES = {"mma_bf16": torch.bfloat16, "mma_f16": torch.float16, "mma_tf32": torch.float32}


def fragments(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A [16, K], two B [K, 8] and two C [16, 8]."""
    k = 8 if name == "mma_tf32" else 16
    return torch.randn(16, k).to(DTYPES[name]), torch.randn(2, k, 8).to(DTYPES[name]), torch.randn(2, 16, 8)


def cut(x: Tensor, rounds: int) -> Tensor:
    """What a tensor core reads of a tf32 operand, ten bits of mantissa: rounded by to_tf32, else cut off."""
    return torch.from_numpy(((x.numpy().view(np.uint32) + 0x1000 * rounds) & 0xFFFFE000).view(np.float32))


@pytest.mark.parametrize("row", [0, 1], ids=["alone", "row"])
@pytest.mark.parametrize("rounds", [0, 1])
@pytest.mark.parametrize("name", DTYPES)
def test_mma_is_the_product(name: str, rounds: int, row: int, turns: str) -> None:
    a, b, c = fragments(name)
    right, wrong = c.clone(), c.clone()
    with counting() as counts:
        probe(name, [a, b, right], 0, rounds, row)
    assert counts[name] == 2
    read = [cut(x, rounds).double() if name == "mma_tf32" else x.double() for x in (a, b)]
    expected = c.double() + read[0] @ read[1]
    assert ((right - expected).abs() <= (c.abs().double() + read[0].abs() @ read[1].abs()) * 2**-21).all()
    if name == "mma_tf32":
        assert ((right - (c + a @ b)).abs() > 1e-5).any()
    probe(name, [a, b, wrong], 1, rounds, row)  # a wrong lane map of B
    assert ((wrong - expected).abs() > 0.1).any()


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix_gives_a_lane_two_neighbours(matrices: int, transposed: int, turns: str) -> None:
    rows = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.zeros(32, 4, dtype=torch.int32)
    probe("ldmatrix", [rows, out], 3 if matrices == 2 else 0, matrices, transposed, shared=512)
    read = words(rows).transpose(0, 2, 1) if transposed else words(rows)
    # Lane l has, of each matrix, the words 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
    pairs = np.ascontiguousarray(read).view(np.uint32).reshape(4, 32)[:matrices].T
    assert np.array_equal(out.numpy().view(np.uint32)[:, :matrices], pairs)
    assert not out[:, matrices:].any()


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_product_from_shared_memory(transposed: int, turns: str) -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    out = torch.zeros(16, 8)
    probe("product", [a, b.T.contiguous() if transposed else b, out], 0, transposed, threads=64, shared=768)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matrices", [2, 4])
def test_a_row_that_ldmatrix_cannot_read_ends_the_launch(matrices: int, turns: str) -> None:
    arguments = [torch.zeros(4, 8, 8, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32)]
    with pytest.raises(RuntimeError, match=r"a row of probes.cuh:\d+'s ldmatrix is not aligned to 16 bytes in thread"):
        probe("ldmatrix", arguments, 1, matrices, 0, shared=512)
    with pytest.raises(RuntimeError, match="ldmatrix is not in the shared memory of the block in thread"):
        probe("ldmatrix", arguments, 2, matrices, 0, shared=512)


@pytest.mark.parametrize("mask", [0, 1, 2, 4, 8, 16, 21, 31])
def test_shuffle_gives_the_other_lanes_value(mask: int, turns: str) -> None:
    values, out = torch.randn(2, 96), torch.zeros(2, 96)
    probe("shuffle", [values, out], 0, mask, blocks=2, threads=96)
    lanes = torch.arange(96)
    assert torch.equal(out, values[:, lanes // 32 * 32 + ((lanes % 32) ^ mask)])


def test_numbers_are_rounded_as_pytorch_and_the_card_do() -> None:
    bits = torch.randint(-(2**31), 2**31, (20000,), dtype=torch.int32).view(torch.float32)
    # Ties of each format, its largest numbers, and what is no number.
    odd = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, 65504.0, 65519.9, 65520.0, 3.4e38, 1e-7, 6e-8, 2**-149]
    signed = torch.tensor([sign * x for x in [*odd, 0.0, float("inf"), float("nan")] for sign in (1, -1)])
    x = torch.cat([bits, signed, torch.randn(2000), torch.randn(2000) * 30]).contiguous()
    out = torch.zeros(9, x.numel())
    probe("numbers", [x, out], 0, x.numel(), threads=64)
    expected_tf32 = ((x.numpy().view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000).astype(np.uint32)
    tf32 = torch.where(x.isnan() | x.isinf(), x, torch.from_numpy(expected_tf32.view(np.float32)))
    rounded = [tf32, *[x.bfloat16().float()] * 2, *[x.half().float()] * 2]
    for mine, theirs in zip(out[:5], rounded, strict=True):
        assert mine.equal(theirs) or mine[~theirs.isnan()].equal(theirs[~theirs.isnan()])
        assert mine.isnan().equal(theirs.isnan())
    functions = [torch.exp, torch.log1p, torch.tanh, torch.rsqrt]
    for mine, function in zip(out[5:], functions, strict=True):
        torch.testing.assert_close(
            mine.double(), function(x.double()).float().double(), rtol=1e-6, atol=0, equal_nan=True
        )


# ---- barriers


def reversal(bug: int) -> bool:
    x, out = torch.randn(3, 64), torch.zeros(3, 64)
    probe("reversal", [x, out], bug, blocks=3, threads=64, shared=256)
    value = 2 * x.flip(1)
    return torch.equal(out, value + value.roll(-1, 1))


def test_a_block_barrier_and_one_that_is_missing(turns: str) -> None:
    assert reversal(0)
    assert not reversal(1)
    assert not reversal(2)


def test_a_barrier_can_be_left_out(turns: str) -> None:
    """So that a program's test shows that it would see the absence of each of its barriers."""
    met = barriers(lambda: reversal(0))
    first = line_of("if (arguments.numbers[0] != 1) block_barrier();")
    assert met == [f"probes.cuh:{line}" for line in (first, first + 2, first + 4)]
    for barrier in met:
        with without(barrier):
            assert barriers(lambda: reversal(0)) == [other for other in met if other != barrier]
            assert not reversal(0)
    assert reversal(0)


def test_a_missing_barrier_before_ldmatrix(turns: str) -> None:
    a, b, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16(), torch.zeros(16, 8)
    probe("product", [a, b, out], 1, 0, shared=768)
    assert out.isnan().any()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_cluster_reads_its_peers(ranks: int, turns: str) -> None:
    x, out = torch.randn(2, ranks, 64), torch.zeros(2, ranks, 64)
    how = {"blocks": 2 * ranks, "threads": 64, "shared": 256, "cluster": ranks}
    probe("cluster", [x, out], 0, ranks, **how)
    torch.testing.assert_close(out, x.sum(1, keepdim=True).expand_as(x))
    probe("cluster", [x, out], 1, ranks, **how)
    assert out.isnan().any()
    out.zero_()
    with pytest.raises(RuntimeError, match=r"peer \(probes.cuh:\d+\) of a block that has left"):
        probe("cluster", [x, out], 2, ranks, **how)
    with pytest.raises(RuntimeError, match=rf"peer \(probes.cuh:\d+\) of rank {ranks} in a cluster of {ranks}"):
        probe("cluster", [x, out], 3, ranks, **how)


def test_a_write_to_a_block_that_has_left() -> None:
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="the shared memory of block 0 was written after it had left"):
        probe("cluster", [x, x.clone()], 4, 2, blocks=2, threads=64, shared=256, cluster=2)


def grid(bug: int) -> bool:
    before = torch.randn(5, 64)
    after = before.clone()
    probe("grid", [after], bug, 3, blocks=5, threads=64, cooperative=True)
    return torch.equal(after, before.roll(-3, 0) + 1 + 1 + 1)


def test_a_grid_barrier_and_one_that_is_missing(turns: str) -> None:
    assert grid(0)
    assert not grid(1)


def test_many_blocks_are_there_at_once() -> None:
    map_ = torch.zeros(132 * 256)
    probe("grid", [map_], 0, 4, blocks=132, threads=256, cooperative=True)
    assert torch.equal(map_, torch.full_like(map_, 4))


BARRIER = r"block_barrier \(probes.cuh:\d+\)"
DIVERGENT = {
    1: rf"no thread can go on: 63 threads wait at {BARRIER} \(first thread 0 of block 0\), 1 threads have left \(first "
    r"thread 40 of block 0\)",
    2: rf"is at {BARRIER} where thread \d+ of block 0 waits at {BARRIER}",
    3: rf"is at {BARRIER} where thread \d+ of block 0 waits at {BARRIER}",
    4: rf"no thread can go on: 32 threads wait at {BARRIER} \(first thread 16 of block 0\), 32 threads wait at "
    r"shuffle_xor \(probes.cuh:\d+\) \(first thread 0 of block 0\)",
    5: r"is at (shuffle_xor|warp_barrier) \(probes.cuh:\d+\) where thread \d+ of block 0 waits at "
    r"(warp_barrier|shuffle_xor) \(probes.cuh:\d+\)",
    6: r"grid_barrier \(probes.cuh:\d+\) in a launch that is not cooperative",
}


@pytest.mark.parametrize("bug", DIVERGENT)
def test_threads_that_do_not_meet_end_the_launch(bug: int, turns: str) -> None:
    with pytest.raises(RuntimeError, match=DIVERGENT[bug]):
        probe("divergent", [], bug, threads=64)
    probe("divergent", [], 0, threads=64)  # and the next one runs


# ---- memory


def later(bug: int) -> bool:
    """Whether what was copied for each of 64 threads is where the thread before it reads."""
    x, out = torch.arange(260.0)[:256].view(64, 4), torch.zeros(64, 4)
    probe("later", [x, out], bug, threads=64, shared=1024)
    return torch.equal(out, x.roll(-1, 0))


def test_a_copy_is_there_after_the_wait_and_a_barrier(turns: str) -> None:
    assert later(0)
    assert not later(1)
    assert not later(2)


@pytest.mark.parametrize(("bug", "said"), [(3, "is not aligned to 16 bytes"), (4, "does not go to the shared memory")])
def test_a_copy_that_a_card_does_not_make(bug: int, said: str) -> None:
    with pytest.raises(RuntimeError, match=f"a copy of probes.cuh:{line_of('copy_later(row')}.*{said}"):
        later(bug)


def halo(bug: int) -> Tensor:
    """Sums of three neighbours in a row of 64 with a zero on both sides; 66 numbers, then a gap of 24 bytes."""
    out = torch.zeros(64)
    x = torch.ones(64) if sanitized() else fenced(torch.ones(64))
    probe("halo", [x, out], bug, threads=64, shared=66 * 4 + 24)
    return out


def test_a_halo_is_read(turns: str) -> None:
    assert halo(0).tolist() == [2] + [3] * 62 + [2]


BEYOND = {
    1: ("float sum = row", None),
    2: ("row[width + 3] = 1", "block 0 wrote byte 268 of its shared memory, which is a gap"),
    3: ("row[width + 8] = 1", "block 0 wrote byte 288 of its shared memory, which is beyond the 288 asked for"),
    4: ("row[-1] = 1", "block 0 wrote byte -4 of its shared memory, which is beyond the 288 asked for"),
    5: ("arguments.tensor<float>(0)[thread() + 1]", None),
}


@pytest.mark.parametrize("bug", BEYOND)
def test_an_access_out_of_bounds_is_seen(bug: int) -> None:
    """By a NaN or by what was written; under the sanitizer by the line."""
    text, message = BEYOND[bug]
    if sanitized():
        done = in_a_process(f"import test_simt; test_simt.halo({bug})")
        assert ("heap-buffer-overflow" if bug == 5 else "use-after-poison") in done.stderr
        assert f"probes.cuh:{line_of(text)}" in done.stderr
    elif message is None:
        assert halo(bug)[-1].isnan()
    else:
        with pytest.raises(RuntimeError, match=message):
            halo(bug)


def in_a_process(program: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(CHECKOUT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=variables, timeout=120)


def test_a_stack_that_is_too_small_is_said() -> None:
    probe("deep", [], 10)
    if not sanitized():  # where frames are larger, and so are stacks
        with pytest.raises(RuntimeError, match=r"thread \d+ of block 0 needs more than 64 KiB of stack"):
            probe("deep", [], 200)


# ---- launches


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"blocks": 0}, "a grid must be a multiple of a cluster of 1 to 8 blocks; got 0 in clusters of 1"),
        (
            {"blocks": 3, "cluster": 2},
            "a grid must be a multiple of a cluster of 1 to 8 blocks; got 3 in clusters of 2",
        ),
        ({"blocks": 16, "cluster": 16}, "cluster of 1 to 8 blocks; got 16 in clusters of 16"),
        ({"threads": 48}, "a block of this kernel must have a multiple of 32 threads, at most 1024; got 48"),
        ({"threads": 1056}, "a block of this kernel must have a multiple of 32 threads, at most 1024; got 1056"),
        ({"shared": 232449}, "a block has at most 232448 bytes of shared memory; got 232449"),
    ],
    ids=str,
)
def test_a_launch_that_a_card_would_refuse(how: dict[str, int], message: str) -> None:
    out = torch.zeros(16, 1056, 6, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        probe("identity", [out], **how)
    assert not out.any()


def test_launches_and_meetings_are_counted() -> None:
    with counting() as counts:
        reversal(0)
        probe("divergent", [], 0, threads=64)
    expected = {"launch": 2, "block_barrier": 10}
    assert counts == {kind: expected.get(kind, 0) for kind in KINDS}


def test_conflicts_of_banks_are_counted() -> None:
    """Rows 16 bytes apart take the eight groups of banks in turn, rows of 32 bytes only every other one."""
    rows, out = torch.zeros(4, 8, 8, dtype=torch.int16), torch.zeros(32, 4, dtype=torch.int32)
    with counting() as counts:
        probe("ldmatrix", [rows, out], 0, 4, 0, shared=512)
    assert (counts["ldmatrix"], counts["bank_conflicts"]) == (1, 0)
    a, b = torch.zeros(16, 16).bfloat16(), torch.zeros(16, 8).bfloat16()
    with counting() as counts:
        probe("product", [a, b, torch.zeros(16, 8)], 0, 0, shared=768)
    assert (counts["ldmatrix"], counts["ldmatrix_transposed"], counts["bank_conflicts"]) == (1, 1, 4)
