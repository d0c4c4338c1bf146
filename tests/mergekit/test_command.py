"""The command line with mergekit's files and mergekit's options."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from calmerge import open_checkpoint
from calmerge.cli import app

CONFIG = """merge_method: linear
models:
- {model: a, parameters: {weight: [1, 0]}}
- {model: b, parameters: {weight: [0, 1]}}
"""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, x in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        tensors = {f"h.{i}.mlp.w": torch.full((2,), x) for i in range(3)} | {"embed.w": torch.full((2,), x)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "config.yml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_the_folder_may_stand_behind_the_file() -> None:
    call("merge", "config.yml", "out", "-q")
    assert {n: w[0].item() for n, w in open_checkpoint("out").items()} == {
        "embed.w": 1, "h.0.mlp.w": 1, "h.1.mlp.w": 2, "h.2.mlp.w": 3
    }  # fmt: skip
    assert "given twice" in call("merge", "config.yml", "out2", "--out", "out3", code=2)


def test_a_converted_recipe_is_printed_or_written() -> None:
    printed = call("convert", "config.yml")
    assert "- tensors: [h.1.*]\n    merge:\n      mergekit_linear:\n        weight: [0.5]" in printed
    Path("sub").mkdir()
    call("convert", "config.yml", "--out", "sub/recipe.yaml")
    call("merge", "sub/recipe.yaml", "out", "-q")
    assert open_checkpoint("out")["h.1.mlp.w"][0] == 2
    call("merge", "config.yml", "direct", "-q")
    assert Path("out/model.safetensors").read_bytes() == Path("direct/model.safetensors").read_bytes()


def test_convert_writes_over_no_file_and_says_where_it_cannot_write() -> None:
    assert "'config.yml' is there already" in call("convert", "config.yml", "--out", "config.yml", code=1)
    assert Path("config.yml").read_text() == CONFIG
    assert "config.yml/r cannot be written" in call("convert", "config.yml", "--out", "config.yml/r", code=1)


def test_validate_and_the_dry_run_know_the_dialect() -> None:
    found = json.loads(call("validate", "config.yml", "--json"))
    assert (found["tasks"], found["merged"]) == (["a", "b"], 4)
    assert json.loads(call("merge", "config.yml", "--dry-run", "--json"))["merged"] == 4


def test_models_that_are_not_there_are_named_together_with_their_lines() -> None:
    Path("config.yml").write_text(CONFIG.replace("model: a", "model: x/y/z").replace("model: b", "model: ./nowhere"))
    said = call("validate", "config.yml", code=1)
    assert "config.yml:3: no model is at 'x/y/z'" in said
    assert "config.yml:4: no model is at './nowhere'" in said


def test_options_of_mergekit_are_read_or_explained() -> None:
    call(
        "merge", "config.yml", "out", "--out-shard-size", "5B", "--lazy-unpickle", "-j", "2", "--random-seed", "3", "-q"
    )
    assert json.loads(Path("out/calmerge.json").read_text())["recipe"]["seed"] == 3
    assert "Merging runs on the processor" in call("merge", "config.yml", "out2", "--cuda", code=2)


def test_every_parameter_is_explained_for_the_tensors_it_is_for() -> None:
    rows = json.loads(call("explain", "--recipe", "config.yml", "--json"))
    weights = {name: row["value"] for row in rows if row["option"] == "weight" for name in row["names"]}
    assert weights == {"embed.w": [1, 0], "h.0.mlp.w": [1, 0], "h.1.mlp.w": [0.5], "h.2.mlp.w": [0, 1]}
