"""Every planted defect still fits the sources it is planted in; whether the suite notices it: test_planted_defects.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from plants import PLANTS, Plant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_there_is_one_place_for_it(plant: Plant) -> None:
    assert (ROOT / plant.file).read_text(encoding="utf-8").count(plant.old) == 1
    for test in plant.tests:
        file, _, name = test.partition("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in source, test
