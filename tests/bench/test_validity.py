"""Experts made by another recipe: beside the suite's own, on its base and data."""

import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from calmerge.suites.suite import load_suite

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

validity = pytest.importorskip("validity")


def test_a_remade_suite_differs_in_how_its_experts_are_made_and_where_they_lie(
    tiny_suite: Path, tmp_path: Path
) -> None:
    file = tiny_suite.with_name("trained.yaml")
    file.write_text(tiny_suite.read_text().replace("pool:", "train: colours-pool.csv, pool:"))
    suite = load_suite(file)
    again = validity.remade(suite, dict(map(validity.setting, ["lr=2e-4", "head=first"])), tmp_path / "other")
    assert again.data["finetune"] == {"lr": 2e-4, "head": "first"}
    assert again.base == suite.base
    for name, task in again.tasks.items():
        assert task.pool == suite.tasks[name].pool
        assert task.expert == tmp_path / "other" / "experts" / name


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="expected KEY=VALUE, got 'lr'"):
        validity.setting("lr")
