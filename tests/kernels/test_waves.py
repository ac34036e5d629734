"""Dealing tiles: every tile once, nobody much later than the others; cases computed by hand."""

from __future__ import annotations

import heapq
import json

import pytest
from abft.triton_kernels import waves
from hypothesis import given
from hypothesis import strategies as st

from bench import predictions
from bench.results import FOLDER, dump, read


def shares(data_tiles, check_tiles, programs, cost):
    """Check tiles of every program, as lists."""
    d = waves.deal(data_tiles, check_tiles, programs, cost)
    starts = [waves.first_of((p - d.behind) % programs, programs, d) for p in range(programs)]
    stops = [waves.first_of((p - d.behind) % programs + 1, programs, d) for p in range(programs)]
    return [list(range(a, b)) for a, b in zip(starts, stops, strict=True)]


def test_what_fits_beside_the_last_round_costs_nothing():
    # 10 data tiles on 4 programs: two have 3, two have 2. Four halves fit beside the third round.
    assert shares(10, 4, 4, 0.5) == [[], [], [0, 1], [2, 3]]
    assert waves.loads(10, 4, 4, 0.5) == [3, 3, 3, 3]
    # One more, and somebody works half a tile longer.
    assert waves.makespan(10, 5, 4, 0.5) == 3.5


def test_tiles_that_come_out_even_leave_no_room():
    assert waves.loads(8, 4, 4, 0.5) == [2.5] * 4
    assert waves.loads(8, 5, 4, 0.5) == [3, 2.5, 2.5, 2.5]


def test_4096_cubed_and_8192_cubed_on_132_multiprocessors():
    # 1024 data tiles of 128 × 128 are 7 rounds and 100 tiles; 32 check tiles as large as these fit beside the eighth.
    assert waves.makespan(1024, 32, 132, 1.0) == 8
    # 4096 are 31 rounds and 4 tiles: 128 more fill the thirty-second exactly.
    assert waves.makespan(4096, 128, 132, 1.0) == 32
    # Dealt as a third kind of work, after the others: an eighth longer.
    assert -(-1024 // 132) + -(-32 // 132) == 9
    # 16384 × 14336: 14336 are 108 rounds and 80 tiles; 896 halves, 104 of which fit, leave six for each.
    assert waves.makespan(14336, 896, 132, 0.5) == 109 + 0.5 * 6


@pytest.mark.parametrize("size", [4096, 8192])
def test_the_full_panel_is_predicted_to_cost_at_most_three_percent(size):
    predicted = predictions.predict(size, size, size)
    assert predicted["columns"] == size // 512 * 16
    assert 1.0 < predicted["ratio"] <= 1.03


def test_a_prediction_counts_steps_and_what_a_tile_takes_besides(monkeypatch):
    def tile(step, besides):
        return {"step": {"issued": step}, "besides": {"issued": besides}}

    # 4096³: 8 rounds, in the last of which the check tiles fit. 64 steps of 128 · 128 · 64 / 2048 = 512 cycles; 8 warps, 4 schedulers.
    monkeypatch.setattr(predictions, "_tiles", lambda *sizes: ([tile(90, 1000), tile(90, 400)], tile(90, 500)))
    r = predictions.predict(4096, 4096, 4096)
    assert (r["tile"], r["unchecked_tile"]) == ("128 × 128", "128 × 128")
    assert (r["rounds"], r["cycles"], r["unchecked_cycles"]) == (8, 8 * (64 * 512 + 2000), 8 * (64 * 512 + 1000))
    # One round of 128 tiles, and 16 check tiles of 32 columns, of (128 + 32) · 64 · 2 / 64 = 320 cycles a step: one for each of the four
    # programs that have no data tile, then another one for these and for eight that have one.
    assert predictions.predict(2048, 1024, 4096)["cycles"] == (64 * 512 + 2000) + (64 * 320 + 800)
    # A step of more instructions than its matrix instructions take time: 300 · 8 / 4 cycles.
    monkeypatch.setattr(predictions, "_tiles", lambda *sizes: ([tile(300, 1000), tile(90, 400)], tile(90, 500)))
    assert predictions.predict(4096, 4096, 4096)["cycles"] == 8 * (64 * 600 + 2000)


def test_the_committed_predictions_follow_from_the_committed_audit():
    """After a new audit: python -m bench predict"""
    records = [r for r in read(FOLDER / "predictions.jsonl") if r["kind"] == "prediction"]
    assert len(records) == 2 * len(list(predictions.shapes()))
    for r in records:
        found = predictions.predict(r["m"], r["n"], r["k"], r["form"])
        assert json.loads(dump(found)) == {key: r[key] for key in found}, r["name"]


sizes = st.integers(0, 900), st.integers(0, 400), st.integers(1, 140), st.sampled_from([0.125, 0.25, 0.5, 1.0])


@given(*sizes)
def test_shares_count_what_is_dealt(data_tiles, check_tiles, programs, cost):
    counted = waves.shares(data_tiles, check_tiles, programs, cost)
    assert [checks for _, checks in counted] == [len(dealt) for dealt in shares(data_tiles, check_tiles, programs, cost)]
    assert [data for data, _ in counted] == [len(range(p, data_tiles, programs)) for p in range(programs)]


@given(*sizes)
def test_every_check_tile_is_dealt_once(data_tiles, check_tiles, programs, cost):
    dealt = sorted(tile for share in shares(data_tiles, check_tiles, programs, cost) for tile in share)
    assert dealt == list(range(check_tiles))


@given(*sizes)
def test_the_last_is_at_most_one_check_tile_later_than_least_loaded_first(data_tiles, check_tiles, programs, cost):
    busy = [-(-(data_tiles - p) // programs) for p in range(programs)]
    heapq.heapify(busy)
    for _ in range(check_tiles):
        heapq.heapreplace(busy, busy[0] + cost)
    assert waves.makespan(data_tiles, check_tiles, programs, cost) <= max(busy) + cost
