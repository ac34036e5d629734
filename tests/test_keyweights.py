"""Weights of keys: which patterns of equal errors they leave visible, gone through one by one; and that the table is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from abft import keyweights
from abft.keyweights import PERIOD, of_keys

#: In units of 1/64 everything is a whole number, and so exact.
UNIT = 64
W = (of_keys(4 * PERIOD) * UNIT).astype(np.int64)
BLOCK = 32


def least_run(w: np.ndarray, longest: int) -> int:
    """The least |sum| of a run of up to so many neighbours."""
    sums = np.concatenate([[0], w.cumsum()])
    return min(int(np.abs(sums[length:] - sums[:-length]).min()) for length in range(1, longest + 1))


def lanes(width: int) -> dict[str, np.ndarray]:
    """Columns of a block that one stuck part of a chip would hit: every 2nd … 32nd, and those of a thread of an accumulator."""
    n = np.arange(width)
    every = {f"{stride}: {first}": n % stride == first for stride in (2, 4, 8, 16, 32) for first in range(stride)}
    return every | {f"thread {lane}": n // 2 % 4 == lane for lane in range(4)}


def test_the_table_is_what_it_says():
    w = W[:PERIOD]
    assert (np.abs(w) >= UNIT // 2).all() and np.abs(w).max() == keyweights.LARGEST * UNIT
    assert np.sqrt(np.mean((w / UNIT) ** 2)) <= keyweights.RMS < 1.01 * np.sqrt(np.mean((w / UNIT) ** 2))
    assert (W[PERIOD : 2 * PERIOD] == w).all() and w.sum() == 17, "of that period"
    assert (of_keys(PERIOD).view(np.uint32) & 0xFFFF == 0).all(), "exact in bf16, so products with half precision are exact in fp32"
    assert all((of_keys(n) == of_keys(PERIOD)[:n]).all() for n in (1, 16, 40)) and of_keys(16).dtype == np.float32


def test_no_run_of_neighbours_cancels():
    sums = W[: PERIOD - 1].cumsum()
    assert len({0, *sums.tolist()}) == PERIOD and (sums % 4 == 0).all(), "within a period: different multiples of 1/16"
    assert least_run(W[: PERIOD - 1], PERIOD - 1) >= UNIT // 16 and least_run(W, 3 * PERIOD) >= 1
    assert least_run(np.array([1.0, -1.0] * 4), 8) == 0, "signs do"


@pytest.mark.parametrize("length", [2, 4, 8, 16, 32, 64, 128])
def test_aligned_runs_leave_a_quarter(length):
    assert np.abs(W[:PERIOD].reshape(-1, length).sum(1)).min() >= UNIT // 4


@pytest.mark.parametrize("which", lanes(BLOCK))
def test_what_one_lane_computes_leaves_something_in_any_number_of_blocks(which):
    of_blocks = W[:PERIOD].reshape(-1, BLOCK)[:, lanes(BLOCK)[which]].sum(1)
    assert np.abs(of_blocks).min() >= UNIT // 4 and np.abs(of_blocks.reshape(-1, 2).sum(1)).min() >= UNIT // 4
    assert least_run(np.concatenate([of_blocks, of_blocks[:-1]]), len(of_blocks)) >= UNIT // 16


@pytest.mark.parametrize("apart", [1, 2, 4, 8, 16, 32])
def test_neither_equal_nor_opposite_pairs_cancel(apart):
    """Opposite errors: two scores that changed places."""
    first, second = W[:PERIOD], W[apart : PERIOD + apart]
    assert np.abs(first - second).min() >= 1 and np.abs(first + second).min() >= 1
