"""Entries that are no numbers are found in all inputs at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from calmerge import CheckpointError, task_vectors
from calmerge._values import check_values
from calmerge.cli import app

NAN, INF = float("nan"), float("inf")


def test_all_tensors_of_all_inputs_are_named_together() -> None:
    base = {"w": torch.zeros(2, 2), "v": torch.tensor([INF, 1.0])}
    experts = {
        "cars": {"w": torch.tensor([[NAN, 1.0], [INF, -INF]]), "v": torch.ones(2)},
        "dtd": {"w": torch.ones(2, 2), "v": torch.ones(2), "head": torch.tensor([NAN])},
    }
    with pytest.raises(CheckpointError) as refused:
        check_values(task_vectors(base, experts))
    for words in (
        "the base: tensor 'v' has entries that are no numbers: 0 NaN, 1 infinite, of 2.",
        "expert 'cars': tensor 'w' has entries that are no numbers: 1 NaN, 2 infinite, of 4.",
        "the head of expert 'dtd': tensor 'head' has entries that are no numbers: 1 NaN, 0 infinite, of 1.",
    ):
        assert words in str(refused.value)


def test_sound_inputs_pass_also_where_a_sum_overflows() -> None:
    big = torch.full((4,), 3e38)
    check_values(task_vectors({"w": big, "steps": torch.tensor(3)}, {"a": {"w": -big, "steps": torch.tensor(4)}}))


def test_what_an_expert_has_and_is_not_merged_may_be_anything() -> None:
    base, bad = {"w": torch.zeros(1), "x": torch.zeros(1)}, {"w": torch.ones(1), "x": torch.tensor([NAN])}
    check_values(task_vectors(base, {"a": bad}, exclude=["x"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_every_stored_type(dtype: torch.dtype) -> None:
    bad = torch.tensor([1.0, NAN, INF]).to(dtype)
    with pytest.raises(CheckpointError, match="1 NaN, 1 infinite, of 3"):
        check_values(task_vectors({"w": bad}, {"a": {"w": torch.ones(3)}}))


def test_validate_reads_them_only_when_asked(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    save_file({"w": torch.tensor([1.0, NAN, 2.0])}, tmp_path / "bad.safetensors")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps({"base": "./base.safetensors", "experts": {"a": "./bad.safetensors"}, "merge": "average"})
    )
    headers = CliRunner().invoke(app, ["validate", str(recipe)])
    assert headers.exit_code == 0, headers.output
    values = CliRunner().invoke(app, ["validate", str(recipe), "--values", "--quiet"])
    assert values.exit_code == 1
    assert "expert 'a': tensor 'w' has entries that are no numbers: 1 NaN, 0 infinite, of 3." in " ".join(
        values.output.split()
    )
    save_file({"w": torch.tensor([1.0, 3.0, 2.0])}, tmp_path / "bad.safetensors")
    assert CliRunner().invoke(app, ["validate", str(recipe), "--values", "--quiet"]).exit_code == 0
