"""Merged folders: everything to make them again, heads apart, inputs safe."""

import json
from pathlib import Path

import pytest
import torch

import calmerge as cm
from calmerge import CheckpointError, OutputError
from calmerge._hash import hash_of


def folder(place: Path, tensors: dict[str, torch.Tensor], **files: str) -> Path:
    tvs = cm.task_vectors(tensors, {"x": tensors})
    cm.save(place, tvs, tvs.of("x"))
    for name, text in files.items():
        (place / f"{name}.json").write_text(text)
    return place


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base = folder(tmp_path / "base", {"w": torch.zeros(2), "n": torch.tensor(3)}, config='{"kind": "base"}')
    for task, value in {"cars": 1.0, "pets": 3.0}.items():
        own = {"model.w": torch.full((2,), value), "model.n": torch.tensor(9), "head.bias": torch.full((3,), value)}
        folder(tmp_path / task, own, config=f'{{"kind": "{task}"}}')
    tvs = cm.task_vectors(base, {task: tmp_path / task for task in ("cars", "pets")})
    cm.save(tmp_path / "merged", tvs, cm.average(tvs), recipe={"merge": ["average"]}, card="# A card\n")
    return tmp_path / "merged"


def test_backbone_is_merged_and_the_rest_is_the_base_s(merged: Path) -> None:
    weights = cm.open_checkpoint(merged)
    assert weights["w"].tolist() == [2.0, 2.0]
    assert weights["n"].item() == 3
    assert "head.bias" not in weights
    assert (merged / "config.json").read_text() == '{"kind": "base"}'
    assert (merged / "README.md").read_text() == "# A card\n"


def test_manifest_has_recipe_versions_hashes_and_reasons(merged: Path) -> None:
    manifest = json.loads((merged / "calmerge.json").read_text())
    assert manifest["recipe"] == {"merge": ["average"]}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["inputs"]["expert cars"] == {
        "model.safetensors": hash_of(merged.parent / "cars" / "model.safetensors")
    }
    assert manifest["not_merged"] == {"n": "integer tensor"}
    assert manifest["files"]["model.safetensors"] == hash_of(merged / "model.safetensors")


def test_export_gives_back_the_expert_s_own_names_and_configuration(merged: Path, tmp_path: Path) -> None:
    cm.export(merged, "pets", tmp_path / "out")
    weights = cm.open_checkpoint(tmp_path / "out" / "model.safetensors")
    assert weights["model.w"].tolist() == [2.0, 2.0]
    assert weights["head.bias"].tolist() == [3.0, 3.0, 3.0]
    assert (tmp_path / "out" / "config.json").read_text() == '{"kind": "pets"}'


def test_a_head_in_a_file_of_its_own_comes_back_so(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder(tmp_path / "cars", {"w": torch.ones(2)})
    save_file({"head.bias": torch.ones(3)}, tmp_path / "cars" / "head.safetensors")
    tvs = cm.task_vectors({"w": torch.zeros(2)}, {"cars": tmp_path / "cars"})
    cm.save(tmp_path / "merged", tvs, cm.average(tvs))
    cm.export(tmp_path / "merged", "cars", tmp_path / "out")
    assert list(cm.open_checkpoint(tmp_path / "out" / "model.safetensors")) == ["w"]
    assert list(cm.open_checkpoint(tmp_path / "out" / "head.safetensors")) == ["head.bias"]


def test_export_of_an_unknown_task_says_which_there_are(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no task 'pet'. Did you mean 'pets'\?"):
        cm.export(merged, "pet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_of_another_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no folder that calmerge wrote: calmerge\.json is missing"):
        cm.export(tmp_path, "pets", tmp_path / "out")


def test_inputs_are_never_overwritten(merged: Path) -> None:
    base = merged.parent / "base"
    tvs = cm.task_vectors(base, {"cars": merged.parent / "cars"})
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="the output would overwrite the base; name another folder"):
        cm.save(base, tvs, cm.average(tvs))
    assert (base / "model.safetensors").read_bytes() == before


def test_nan_in_an_expert_stops_the_merge_and_leaves_nothing(tmp_path: Path) -> None:
    tvs = cm.task_vectors({"w": torch.zeros(2)}, {"cars": {"w": torch.tensor([1.0, float("nan")])}})
    with pytest.raises(CheckpointError, match="expert 'cars': tensor 'w' has 1 entries that are NaN or infinite"):
        cm.save(tmp_path / "out", tvs, cm.average(tvs))
    assert list(tmp_path.iterdir()) == []


def test_output_has_the_base_s_type_unless_told_otherwise(tmp_path: Path) -> None:
    tvs = cm.task_vectors({"w": torch.zeros(2).bfloat16()}, {"cars": {"w": torch.ones(2)}})
    cm.save(tmp_path / "a", tvs, cm.average(tvs))
    cm.save(tmp_path / "b", tvs, cm.average(tvs), dtype=torch.float16)
    assert cm.open_checkpoint(tmp_path / "a")["w"].dtype == torch.bfloat16
    assert cm.open_checkpoint(tmp_path / "b")["w"].dtype == torch.float16


def test_same_call_same_bytes(merged: Path, tmp_path: Path) -> None:
    tvs = cm.task_vectors(merged.parent / "base", {t: merged.parent / t for t in ("cars", "pets")})
    cm.save(tmp_path / "again", tvs, cm.average(tvs), recipe={"merge": ["average"]}, card="# A card\n")
    for file in sorted(p for p in merged.rglob("*") if p.is_file()):
        assert (tmp_path / "again" / file.relative_to(merged)).read_bytes() == file.read_bytes(), file
