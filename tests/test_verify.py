"""`verify`: one line for whatever changed since a folder was written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import calmerge as cm
from calmerge import CheckpointError
from calmerge._random import uniform
from calmerge._verify import verify
from calmerge.cli import app

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """Three shards, a side file, and two heads."""
    base = {name: uniform((10, 10), name) for name in "abc"}
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    tvs = cm.task_vectors(tmp_path / "base", {t: {**base, "head": torch.ones(2)} for t in ("x", "y")}, repeated=True)
    cm.save(tmp_path / "merged", tvs, cm.average(tvs), shard=400, card="# A card\n")
    return tmp_path / "merged"


def test_a_folder_as_it_was_written_has_no_fault(merged: Path) -> None:
    assert verify(merged) == []


def test_the_manifest_names_every_file_but_the_card_and_itself(merged: Path) -> None:
    files = {f.relative_to(merged).as_posix() for f in merged.rglob("*") if f.is_file()}
    assert set(json.loads((merged / "calmerge.json").read_text())["files"]) == files - {"calmerge.json", "README.md"}


def test_the_card_may_be_edited(merged: Path) -> None:
    (merged / "README.md").write_text("# A better card")
    assert verify(merged) == []


def test_an_exported_model_is_verified_too(merged: Path, tmp_path: Path) -> None:
    cm.export(merged, "x", tmp_path / "x")
    assert verify(tmp_path / "x") == []
    (tmp_path / "x" / "config.json").unlink()
    assert verify(tmp_path / "x") == ["config.json is missing."]
    with pytest.raises(CheckpointError, match="is one task's model already"):
        cm.export(tmp_path / "x", "x", tmp_path / "again")


@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "heads/x/head.safetensors", "heads/y/names.json"])
def test_a_missing_file(name: str, merged: Path) -> None:
    (merged / name).unlink()
    assert verify(merged) == [f"{name} is missing."]


@pytest.mark.parametrize("name", [SHARDS[1], "config.json", "heads/x/head.safetensors"])
def test_one_changed_byte(name: str, merged: Path) -> None:
    content = (merged / name).read_bytes()
    (merged / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (fault,) = verify(merged)
    assert fault.startswith(f"{name} has changed since it was written: its BLAKE3 is ")


def test_a_file_cut_short(merged: Path) -> None:
    (merged / SHARDS[0]).write_bytes((merged / SHARDS[0]).read_bytes()[:-7])
    (fault,) = verify(merged)
    assert SHARDS[0] in fault


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "heads/x/model.safetensors"])
def test_weights_that_were_not_written_here(name: str, merged: Path) -> None:
    (merged / name).write_bytes(b"")
    assert verify(merged) == [
        f"{name} was not written by this merge, but holds weights that a loader may take; move it away."
    ]


def resealed(folder: Path, name: str) -> None:
    """The manifest as if the changed file had been written so."""
    from calmerge._hash import hash_of

    manifest = json.loads((folder / "calmerge.json").read_text())
    manifest["files"][name] = hash_of(folder / name)
    (folder / "calmerge.json").write_text(json.dumps(manifest))


def test_a_shard_that_holds_other_tensors_than_the_index_says(merged: Path) -> None:
    ((_, tensor),) = load_file(merged / SHARDS[0]).items()
    save_file({"z": tensor}, merged / SHARDS[0])
    resealed(merged, SHARDS[0])
    (fault,) = verify(merged)
    assert "places tensor" in fault
    assert SHARDS[0] in fault


def test_a_tensor_of_another_shape_than_the_index_counts(merged: Path) -> None:
    tensors = load_file(merged / SHARDS[0])
    save_file({name: t[:5].clone() for name, t in tensors.items()}, merged / SHARDS[0])
    resealed(merged, SHARDS[0])
    (fault,) = verify(merged)
    assert fault.endswith("says that the tensors take 1200 bytes, but they take 1000.")


def test_an_index_that_names_a_foreign_file(merged: Path) -> None:
    index = merged / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(SHARDS[2], "other.safetensors"))
    resealed(merged, index.name)
    assert any("names 'other.safetensors', which this merge did not write" in fault for fault in verify(merged))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"../x": "0"}}'])
def test_a_manifest_that_is_none(text: str, merged: Path) -> None:
    (merged / "calmerge.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a readable manifest|lies outside the folder"):
        verify(merged)


def test_on_the_command_line(merged: Path, tmp_path: Path) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["verify", *map(str, words)])
        return done.exit_code, done.stdout, done.stderr

    assert call(merged) == (0, f"{merged} is as it was written.\n", "")
    (merged / SHARDS[1]).unlink()
    (merged / "config.json").unlink()
    assert call(merged)[:2] == (1, f"{SHARDS[1]} is missing.\nconfig.json is missing.\n")
    assert json.loads(call(merged, "--json")[1]) == {"faults": [f"{SHARDS[1]} is missing.", "config.json is missing."]}
    code, _, says = call(tmp_path)
    assert (code, "is no folder that calmerge wrote: calmerge.json is missing" in says) == (1, True)


@pytest.mark.parametrize("said", ["sha256", None])
def test_hashes_of_another_kind_are_not_called_a_change(said: str | None, merged: Path) -> None:
    manifest = json.loads((merged / "calmerge.json").read_text())
    assert manifest.pop("hash") == "blake3"
    (merged / "calmerge.json").write_text(json.dumps(manifest | ({"hash": said} if said else {})))
    with pytest.raises(CheckpointError, match="its hashes are"):
        verify(merged)
