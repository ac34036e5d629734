"""Measured launch shapes: what a table may say, who reads it, and the search that writes it, with a clock that a test winds."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import triton
from abft.triton_kernels import configs, decode, tuning
from kernel_harness import run

from abft.backends import triton as backend
from bench import candidates, shapes, timing, tune, tuned_table
from bench.candidates import Compiled, Row
from bench.results import Results, read
from bench.shapes import Shape

CPU = torch.device("cpu")
HOPPER = 90, "16-bit"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where the table lies during a test; writes tables there, with entries for many rows of 16-bit types on Hopper."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(tuning, "FILE", path)

    def write(*entries, architecture=90, version=triton.__version__):
        table = {"architecture": architecture, "triton": version, "measured": {}, "entries": list(entries)}
        path.write_text(json.dumps({"format": 1, "tables": [table]}))
        tuning._entries.cache_clear()
        backend.forget_plans()
        return path

    write()
    yield write
    tuning._entries.cache_clear()
    backend.forget_plans()


def first(key, shape=None, group=None):
    """The config for many rows of W of a shape."""
    return configs.candidates(*key, group, shape)[0]


def entry(config, *, kind="16-bit", height=None, n=None, k=None):
    return {"kind": kind, "height": height, "n": n, "k": k, "config": config}


# --- reading ---------------------------------------------------------------------------------------------


def test_without_a_file_the_built_in_table_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FILE", tmp_path / "nothing.json")
    assert tuning.find(*HOPPER) is None and configs.candidates(*HOPPER, None) == configs.CONFIGS[HOPPER]


def test_an_entry_changes_the_fields_it_names_for_its_shape_or_for_all(file):
    file(entry({"bn": 256, "stages": 3}), entry({"warps": 4}, n=4096, k=1024), entry({}, n=512, k=512))
    built_in = configs.CONFIGS[HOPPER][0]
    assert first(HOPPER) == replace(built_in, bn=256, stages=3)
    assert first(HOPPER, shape=(9, 9)) == replace(built_in, bn=256, stages=3)
    assert first(HOPPER, shape=(4096, 1024)) == replace(built_in, warps=4)
    assert first(HOPPER, shape=(512, 512)) == built_in
    assert configs.candidates(90, "tf32", None) == configs.CONFIGS[90, "tf32"]
    assert configs.candidates(80, "16-bit", None) == configs.CONFIGS[80, "16-bit"]


def test_a_plan_takes_the_measured_tile_for_its_panel_and_for_few_rows(file):
    file(entry({"bn": 256, "stages": 3}, n=4096, k=1024), entry({"stages": 4}, height=64, n=4096, k=1024))
    plan = backend.plan(4096, 1024, torch.bfloat16, 90, False, "full", None)
    few = backend.plan(4096, 1024, torch.bfloat16, 90, False, "full", None, 1)
    assert plan.config.bn == 256 and few.config.stages == 4 and plan.layout == few.layout
    assert backend.plan(4096, 2048, torch.bfloat16, 90, False, "full", None).config.bn == 128
    # Measured once for a weight, it is taken for every number of rows; elsewhere few tiles are cut smaller.
    widths = [backend.plan(n, 1024, torch.bfloat16, 90, False, "full", None, 512).config.bn for n in (4096, 1024)]
    assert widths == [256, 64]


@pytest.mark.parametrize("group", [None, 512, 320, 128, 32])
def test_a_measured_tile_never_widens_a_group(file, group):
    """Wider groups see less."""
    built_in = backend.plan(11008, 512, torch.bfloat16, 90, False, "full", group).layout.groups
    file(entry({"bn": 256}))
    assert backend.plan(11008, 512, torch.bfloat16, 90, False, "full", group).layout.groups.width <= max(built_in.width, group or 512)
    file(entry({"bn": 256}, kind="tf32"))
    assert first((90, "tf32")).bn == 128  # 256 does not divide 384


def test_tables_for_others_are_left_alone(file):
    file(entry({"warps": 7}), architecture="quantum")
    with pytest.raises(ValueError):  # its entries are still a table's
        tuning.find(*HOPPER)
    file(entry({"warps": 4}), architecture="quantum")
    assert tuning.find(*HOPPER) is None
    file({"nonsense": 1}, version="2.0.0")
    assert tuning.find(*HOPPER) is None


def test_the_interpreter_reads_no_table(file):
    file().write_text("broken")
    assert first((None, "ieee")) == replace(configs.INTERPRETED[0], precision="ieee")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot be read"),
        ("[]", '"format": 1'),
        ('{"format": 2, "tables": []}', '"format": 1'),
        ('{"format": 1, "tables": [{"architecture": 90}]}', "architecture, triton and entries"),
    ],
    ids=["cut short", "another file", "another format", "half a table"],
)
def test_a_broken_file_says_what_is_wrong_and_what_to_do(file, text, says):
    path = file()
    path.write_text(text)
    with pytest.raises(ValueError, match="python -m bench tune") as raised:
        configs.candidates(*HOPPER, None)
    assert says in str(raised.value) and "tuned.json" in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (entry({"bn": 48}), "config.bn"),
        (entry({"bn": True}), "config.bn"),
        (entry({"descriptors": 1}), "config.descriptors"),
        (entry({"precision": "tf32"}), "config.precision"),
        (entry({}, kind="fp4"), "kind"),
        (entry({}, n=4096), r"\(n, k\)"),
        (entry({}, height=0), "height"),
        (entry({"bm": 128}, height=64), "bm of tiles for few rows"),
        ("text", "an entry"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_entry_that_is_none_is_refused(file, wrong, says):
    file(wrong)
    with pytest.raises(ValueError, match=says):
        tuning.find(*HOPPER)


def test_the_table_is_read_once(file):
    file(entry({"warps": 4}))
    assert tuning.find(*HOPPER) == {"warps": 4}
    tuning.FILE.write_text("broken")
    assert tuning.find(*HOPPER) == {"warps": 4}


# --- candidates ------------------------------------------------------------------------------------------

ROWS = [Row(*key) for key in configs.CONFIGS if key[1] != "int8"] + [Row(*key, c.bm) for key, rows in configs.DECODE.items() for c in rows]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_candidates_keep_what_is_no_matter_of_time(row):
    wanted = shapes.named(["square-4096", "llama8b-*-8192"] if row.height is None else ["llama8b-*-1"])
    tiles = candidates.tiles(row, wanted, 132)
    assert tiles[0] == row.built_in and len(tiles) >= 4 and len({candidates.label(c) for c in tiles}) == len(tiles)
    group = configs.default_group(row.kind)
    for c in [*tiles, *candidates.variants(row, tiles[0])]:
        assert (c.precision, c.registers, c.bc) == (row.built_in.precision, row.built_in.registers, row.built_in.bc)
        assert group % c.bn == 0 or row.height is not None
        assert c.bm == row.height if row.height is not None else c.bm >= 64
        assert c.descriptors <= row.built_in.descriptors
        changes = candidates.difference(c, row.built_in)
        assert replace(row.built_in, **changes) == c
        # What the search may find, a table may say.
        for name, value in changes.items():
            assert value in tuning.FIELDS[name]


def test_the_first_candidates_are_those_of_the_waves():
    """132 tiles of 128 × 128 are one round of an H100; as many of 64 × 64 would be four short ones that load more than they multiply."""
    row, (shape,) = Row(*HOPPER), [Shape("s", 12 * 128, 11 * 128, 4096)]
    tiles = candidates.tiles(row, [shape], 132)
    times = [candidates._time(row, c, shape, 132) for c in tiles[1:]]
    assert times == sorted(times)
    assert (tiles[1].bm, tiles[1].bn) == (128, 128) and (tiles[-1].bm, tiles[-1].bn) != (128, 128)


@pytest.mark.parametrize("row", [Row(None, "ieee"), Row(None, "16-bit", 16)], ids=str)
def test_a_plan_inside_takes_the_candidate_and_one_outside_does_not(row):
    config = candidates.tiles(row, [Shape("s", 4, 256, 64)], 3)[1]
    dtype = torch.float32 if row.kind == "ieee" else torch.float16
    with candidates.in_use(row, config):
        inside = backend.plan(256, 64, dtype, None, False, "full", None, row.height).config
    outside = backend.plan(256, 64, dtype, None, False, "full", None, row.height).config
    assert (inside.bm, inside.warps) == (config.bm, config.warps) and outside.warps == row.built_in.warps


@pytest.mark.parametrize("which", [1, -1])
@pytest.mark.parametrize("m", [40, 130])
def test_a_candidate_computes_the_same_and_is_silent(which, m):
    """Whole numbers: every order of summation has the same bits."""
    a, w = (torch.randint(-4, 5, size).float() for size in ((m, 96), (144, 96)))
    row = Row(None, "ieee", decode.height(None, "ieee", m))
    config = candidates.tiles(row, [Shape("s", m, 144, 96)], 3)[which]
    built_in = run(a, w)
    with candidates.in_use(row, config):
        found = run(a, w)
    assert found.plan.config.warps == config.warps and found.detected == 0
    assert torch.equal(found.y, built_in.y) and torch.equal(found.y.double(), a.double() @ w.double().T)


# --- the search ------------------------------------------------------------------------------------------


class Clock:
    """Calls everybody once, and says from then on what the test thinks the launch's config takes."""

    def __init__(self, monkeypatch, seconds):
        self.now, self._last, self._known = 0.0, None, {}
        genuine = configs.Config.launch
        monkeypatch.setattr(configs.Config, "launch", lambda config: self._see(config) or genuine(config))
        self._seconds = seconds

    def _see(self, config):
        self._last = config

    def lap(self, work, calls):
        if work not in self._known:
            work()
            self._known[work] = self._seconds(self._last)
        seconds = self._known[work]
        self.now += seconds * calls
        return timing.Lap(seconds, seconds)


SMALL = [Shape("few", 8, 32, 32), Shape("many", 66, 32, 32)]


@pytest.fixture
def whole_numbers(monkeypatch):
    """Operands of which every order of summation makes the same bits."""

    def draw(shape, dtype, device):
        x, w = (torch.randint(-3, 4, size).to(dtype) for size in ((shape.m, shape.k), (shape.n, shape.k)))
        return x, torch.nn.Parameter(w, requires_grad=False), None

    monkeypatch.setattr(tune, "draw", draw)


def search(folder, clock, *, chosen=SMALL, examine=tune._examined_by_nobody, deadline=math.inf, most_tiles=3, **more):
    results = Results("tune-test", folder=folder)
    cases = tune.cases_of(chosen, ["fp32"], None)
    done = tune.search(cases, results, examine=examine, clock=clock, device=CPU, rounds=6, most_tiles=most_tiles, deadline=deadline, **more)
    return done, results.records


def timed(records):
    return [r for r in records if r["kind"] == "candidate"]


def test_the_search_finds_what_is_faster_and_keeps_what_is_not(tmp_path, monkeypatch, whole_numbers):
    """Warps decide here: eight are slower for many rows and faster for few."""
    few = lambda c: c.bm < 64  # noqa: E731
    clock = Clock(monkeypatch, lambda c: (0.5 if few(c) else 2.0) if c.warps == 8 else 1.0)
    done, records = search(tmp_path, clock)
    assert done
    found = tuned_table.entries(records)
    assert [(e["kind"], e["height"], e["config"], e["ratio"]) for e in found] == [("ieee", 16, {"warps": 8}, 0.5)]
    rows = {(r["shape"], r["label"]): r for r in timed(records)}
    assert len(rows) == len(timed(records)) and {shape for shape, _ in rows} == {"few", "many"}
    for r in rows.values():
        assert r["ratio"] == pytest.approx((0.5 if r["height"] else 2.0) if "warps 8" in r["label"] else 1.0)
        assert r["over_twin"]["ratio"] == 1.0
    # After the tiles come ways of the best one.
    last = [r for r in timed(records) if r["shape"] == "few"][-1]
    assert last["config"].get("warps") == 8 and len(last["config"]) > 1


def test_a_search_ends_in_time_and_goes_on_where_it_stopped(tmp_path, monkeypatch, whole_numbers):
    clock = Clock(monkeypatch, lambda c: 1.0)
    monkeypatch.setattr(tune.time, "monotonic", lambda: clock.now)
    laps = 3 * (3 + 6)  # three competitors, warm-up and rounds, of a second each
    done, records = search(tmp_path, clock, deadline=2.5 * laps)
    # One tile of every row first.
    assert not done and [r["shape"] for r in timed(records)] == ["few", "many", "few"]
    monkeypatch.undo()
    monkeypatch.setattr(tune, "draw", lambda shape, *_: (torch.ones(shape.m, 32), torch.nn.Parameter(torch.ones(32, 32), requires_grad=False), None))
    done, again = search(tmp_path, Clock(monkeypatch, lambda c: 1.0))
    assert done and again[: len(records)] == records and len(timed(again)) > 3
    keys = [r["key"] for r in timed(again)]
    assert len(set(keys)) == len(keys)


def test_what_never_ended_is_not_begun_again(tmp_path, monkeypatch, whole_numbers):
    clock = Clock(monkeypatch, lambda c: 1.0)
    (case,) = tune.cases_of(SMALL[:1], ["fp32"], None)
    second = candidates.tiles(case.row, SMALL[:1], 3)[1]
    Results("tune-test", folder=tmp_path).add("begun", key=case.key(second))
    _, records = search(tmp_path, clock, chosen=SMALL[:1], most_tiles=3)
    assert candidates.label(second) not in {r["label"] for r in timed(records)} and len(timed(records)) >= 2


def test_other_bits_other_instructions_alarms_and_failures_are_left_out(tmp_path, monkeypatch, whole_numbers):
    from abft.triton_kernels import gemm

    clock = Clock(monkeypatch, lambda c: 1.0)
    (case,) = tune.cases_of(SMALL[1:], ["fp32"], None)
    tiles = candidates.tiles(case.row, SMALL[1:], 3)
    _, bits, instructions, spills, alarms, broken = tiles[:6]
    genuine = gemm.multiply

    def multiply(product, *more):
        (tile,) = [t for t in tiles if (t.bm, t.bn, t.warps) == (product.config.bm, product.config.bn, product.config.warps)]
        if tile == broken:
            raise RuntimeError("no such luck\nand more")
        found = genuine(product, *more)
        if tile == bits:
            found.y.view(-1)[5] += 1
        if tile == alarms:
            found.raw.view(-1)[0] += 1e6  # a check tile went wrong; the product did not
        return found

    def examine(case, config):
        return Compiled("checked_product spills") if config == spills else Compiled(None, ("B",) if config == instructions else ("A",))

    monkeypatch.setattr(gemm, "multiply", multiply)
    _, records = search(tmp_path, clock, chosen=SMALL[1:], examine=examine, most_tiles=6)
    reasons = {r["label"]: r["reason"] for r in timed(records) if "reason" in r}
    assert reasons[candidates.label(bits)] == "other bits than the built-in config"
    assert reasons[candidates.label(instructions)] == "other instructions: B, not A"
    assert reasons[candidates.label(spills)] == "checked_product spills"
    assert "alarms on clean data" in reasons[candidates.label(alarms)]
    assert reasons[candidates.label(broken)] == "RuntimeError: no such luck"
    assert len(reasons) == 5


# --- the table -------------------------------------------------------------------------------------------


def record(ratio, high, config, *, m=4096, n=4096, k=4096):
    return {"kind": "candidate", "row": "16-bit", "height": None, "dtype": "bf16", "m": m, "n": n, "k": k, "config": config,
            "ratio": ratio, "low": ratio, "high": high}  # fmt: skip


def test_one_config_for_all_shapes_and_others_where_they_are_better():
    wide, narrow = {"bn": 256}, {"bn": 64}
    records = [record(1.0, 1.0, {}), record(1.0, 1.0, {}, n=1024), record(0.8, 0.81, wide), record(0.98, 0.99, wide, n=1024),
               record(1.1, 1.2, narrow), record(0.9, 0.95, narrow, n=1024)]  # fmt: skip
    everywhere, short = tuned_table.entries(records)
    assert (everywhere["config"], everywhere["n"]) == (wide, None) and everywhere["ratio"] == pytest.approx(math.sqrt(0.8 * 0.98))
    assert (short["config"], short["n"], short["ratio"]) == (narrow, 1024, 0.9)


def test_what_is_not_surely_faster_at_every_number_of_rows_takes_nobody_s_place():
    wide = {"bn": 256}
    base = [record(1.0, 1.0, {}), record(1.0, 1.0, {}, m=512)]
    assert tuned_table.entries([*base, record(0.9, 0.95, wide)]) == []  # not timed at 512 rows
    assert tuned_table.entries([*base, record(0.9, 1.2, wide), record(0.9, 0.95, wide, m=512)]) == []  # not surely
    assert tuned_table.entries([*base, record(0.9, "inf", wide), record(0.9, 0.95, wide, m=512)]) == []  # too few rounds
    assert tuned_table.entries([*base, record(0.9, 0.95, wide), record(0.99, 0.999, wide, m=512)]) != []


def test_a_shape_that_does_best_as_built_in_says_so():
    records = [record(1.0, 1.0, {}), record(1.0, 1.0, {}, n=1024), record(0.5, 0.6, {"bn": 256}), record(1.2, 1.3, {"bn": 256}, n=1024)]
    everywhere, short = tuned_table.entries(records)
    assert everywhere["config"] == {"bn": 256} and (short["n"], short["config"]) == (1024, {})


def test_a_written_table_is_read_and_leaves_others_in_place(file):
    path = file(entry({"warps": 4}), architecture=80)
    found = tuned_table.entries([record(1.0, 1.0, {}), record(0.9, 0.95, {"bn": 256})])
    for _ in range(2):
        tuned_table.write(path, 90, triton.__version__, found, {"gpu": "a test's"})
    tuning._entries.cache_clear()
    assert tuning.find(80, "16-bit") == {"warps": 4} and tuning.find(*HOPPER) == {"bn": 256}
    assert [t["architecture"] for t in tuning.tables(path)] == [80, 90] and tuning.tables(path)[1]["measured"] == {"gpu": "a test's"}
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        tuned_table.write(path, 90, triton.__version__, found, {})


def test_the_command_tries_it_out_and_writes_a_table_for_no_gpu(tmp_path, monkeypatch, whole_numbers, capsys):
    if torch.cuda.is_available():
        pytest.skip("the interpreter, which a GPU's kernels are not made for")
    monkeypatch.setattr(tune.shapes, "named", lambda names: SMALL[:1])
    monkeypatch.setattr(candidates, "variants", lambda row, config: [])
    assert tune.main(["--interpreted", "--tiles", "2", "--rounds", "6", "--out", str(tmp_path)]) == 0
    assert "entries in tuned.json" in capsys.readouterr().out
    (table,) = tuning.tables(tmp_path / "tuned.json")
    assert table["architecture"] == "interpreted" and table["measured"]["triton"] == triton.__version__
    assert {r["kind"] for r in read(tmp_path / "tune-interpreted.jsonl")} == {"stamp", "begun", "candidate"}
    assert tune.main(["--interpreted", "--list"]) == 0 and "built in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tune.main(["--interpreted"])
    assert "--out" in capsys.readouterr().err
