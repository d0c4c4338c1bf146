"""The statistics of the experiments: designs are balanced, and main effects come out as they were put in."""

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

flagship = pytest.importorskip("flagship")


def test_every_level_of_the_design_stands_equally_often() -> None:
    cells = flagship.factorial("vision", runs=30)
    for factor, levels in flagship.FACTORS.items():
        counts = Counter(getattr(cell, factor) for cell in cells)
        assert set(counts) == set(levels)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_main_effects_of_an_additive_table_come_out_exactly() -> None:
    worth = {"kl": 3.0, "hard": 1.0, "entropy": -4.0, "joint": 0.5, "sequential": -0.5}
    factors = {"objective": ("entropy", "hard", "kl"), "schedule": ("sequential", "joint")}
    cells = [
        {"cell": {"objective": o, "schedule": s}, "normalised": 80 + worth[o] + worth[s]}
        for o in factors["objective"]
        for s in factors["schedule"]
    ]
    found = flagship.effects(cells, "normalised", factors)
    for factor, levels in found.items():
        for level, (effect, half) in levels.items():
            assert effect == pytest.approx(worth[level]), factor
            assert half == pytest.approx(0.0, abs=1e-6)


def test_a_finished_cell_keeps_its_name_when_options_are_added() -> None:
    plain = flagship.Cell("vision", "average", "kl", "span")
    assert plain.key == flagship.Cell("vision", "average", "kl", "span", limit=None, bad_pool="").key
    assert plain.key != flagship.Cell("vision", "average", "kl", "span", limit=1.0).key


def test_the_settled_fraction_keeps_the_cells_that_are_there_and_can_be_solved() -> None:
    cells = flagship.settled("text")
    assert len(set(cells)) == 24
    assert set(cells[:6]) <= set(flagship.confirm("text"))
    for factor, levels in flagship.SETTLED.items():
        assert {getattr(cell, factor) for cell in cells} == set(levels)
    table = [{"cell": vars(cell), "normalised": float(cell.start == "tsv_m")} for cell in cells]
    assert flagship.effects(table, "normalised", flagship.SETTLED)["start"]["tsv_m"][0] == pytest.approx(0.5)
