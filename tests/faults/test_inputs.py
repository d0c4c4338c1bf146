"""Inputs that change, shrink or vanish while they are read: an error that names them, no crash, no mixed weights."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from calmerge import CheckpointError, open_checkpoint, task_vectors
from calmerge._random import uniform
from calmerge.cli import app

LAYERS, ROWS = 6, 200
Change = Callable[[Path], Any]


def shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def replace(file: Path) -> None:
    """As a download does: another file takes the name."""
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes()[:-4] + b"\1\2\3\4")
    os.replace(other, file)


def rewrite(file: Path) -> None:
    """In place, with the same size."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\1\2\3\4")
    os.utime(file, ns=(1, 1))


CHANGES: list[Change] = [shrink, empty, replace, rewrite, Path.unlink, lambda file: shutil.rmtree(file.parent)]
NAMES = ["shrink", "empty", "replace", "rewrite", "unlink", "rmtree"]


@pytest.fixture
def folders(tmp_path: Path, write_folder: Callable[..., Path]) -> dict[str, Path]:
    base = {f"layers.{i}.w": uniform((ROWS, 50), i) for i in range(LAYERS)}
    more = {task: {n: w + uniform(tuple(w.shape), task, n) for n, w in base.items()} for task in "ab"}
    return {name: write_folder(tmp_path / name, tensors) for name, tensors in {"base": base, **more}.items()}


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
@pytest.mark.parametrize("before", ["before the first read", "between two reads"])
def test_a_file_that_changes_is_named(change: Change, before: str, folders: dict[str, Path]) -> None:
    weights = open_checkpoint(folders["a"])
    if before == "between two reads":
        assert weights.read("layers.0.w", slice(0, 3)).shape == (3, 50)
    change(folders["a"] / "model.safetensors")
    with pytest.raises(CheckpointError, match=str(folders["a"] / "model.safetensors")):
        dict(weights)


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
@pytest.mark.parametrize("who", ["base", "b"])
def test_a_merge_whose_input_changes_ends_with_one_error(
    change: Change, who: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("base: ./base\nexperts: {a: ./a, b: ./b}\nmerge: {ties: {keep: 0.5}}\n")
    from calmerge._checkpoint import Checkpoint

    read, left = Checkpoint.read, [LAYERS * 2]

    def reading(self: Checkpoint, *args: Any, **kwargs: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] == 0:
            change(folders[who] / "model.safetensors")
        return read(self, *args, **kwargs)

    monkeypatch.setattr(Checkpoint, "read", reading)
    (tmp_path / "to").mkdir()
    done = CliRunner().invoke(app, ["merge", str(recipe), "--out", str(tmp_path / "to" / "out"), "-q"])
    assert left[0] <= 0
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "to").iterdir()) == []


def test_task_vectors_of_a_vanished_expert_name_it(folders: dict[str, Path]) -> None:
    tvs = task_vectors(folders["base"], {"a": folders["a"]})
    shutil.rmtree(folders["a"])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        tvs["layers.0.w"]
