"""The index of a checkpoint in several files: trusted only as far as the files bear it out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calmerge import CheckpointError, open_checkpoint

INDEX = "model.safetensors.index.json"
TENSORS = {f"layers.{i}.w": torch.full((2,), float(i)) for i in range(6)}


@pytest.fixture
def folder(tmp_path: Path, write_folder: Callable[..., Path]) -> Path:
    return write_folder(tmp_path / "m", TENSORS, 3)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(folder)
    return str(e.value)


def change(folder: Path, **files: str | None) -> None:
    """Says in the index that tensor layers.<key> is in another file, or in none."""
    index = json.loads((folder / INDEX).read_text())
    for key, file in files.items():
        index["weight_map"][f"layers.{key[1:]}.w"] = file
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_all_missing_files_are_named_together(folder: Path) -> None:
    for i in (1, 3):
        (folder / f"model-0000{i}-of-00003.safetensors").unlink()
    assert (
        f"{folder / INDEX}: names 'model-00001-of-00003.safetensors', 'model-00003-of-00003.safetensors', which are "
        "missing. Download the folder again." in refusal(folder)
    )


def test_a_tensor_that_is_in_another_file_than_the_index_says_is_refused(folder: Path) -> None:
    change(folder, _1="model-00001-of-00003.safetensors", _2="model-00001-of-00003.safetensors")
    assert (
        "places tensor 'layers.1.w' in 'model-00001-of-00003.safetensors', which does not hold it; "
        "'model-00002-of-00003.safetensors' does (and 1 more like it). Index and files are of different models"
    ) in refusal(folder)


def test_a_tensor_that_no_file_has_is_refused(folder: Path) -> None:
    change(folder, _9="model-00001-of-00003.safetensors")
    assert (
        "places tensor 'layers.9.w' in 'model-00001-of-00003.safetensors', which does not hold it; no file does."
        in (refusal(folder))
    )


def test_a_tensor_that_the_index_does_not_name_is_refused(folder: Path) -> None:
    change(folder, _3=None)
    assert "does not name tensor 'layers.3.w', which 'model-00001-of-00003.safetensors' holds." in refusal(folder)


def test_a_tensor_twice_in_the_index_is_refused(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"layers.1.w": "other.safetensors", '))
    assert "not a readable index of shards (ValueError: 'layers.1.w' stands in it twice)" in refusal(folder)


def test_an_index_nested_without_end_is_refused(folder: Path) -> None:
    (folder / INDEX).write_text("[" * 100_000)
    assert "not a readable index of shards (RecursionError" in refusal(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "a\\b.safetensors", "m/../x.safetensors", "/etc/passwd", "x\0y"])
def test_names_that_are_no_file_of_the_folder_are_refused(name: str, folder: Path) -> None:
    change(folder, _1=name)
    assert "which lies outside the folder. Refused." in refusal(folder)


def test_a_link_out_of_the_folder_is_refused(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    outside = shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(outside)
    assert f"'{shard.name}', a link that lies outside the folder: it leads to {outside}. Refused" in refusal(folder)


def test_a_link_within_the_folder_and_a_linked_folder_are_opened(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.rename(folder / "second.st")
    shard.symlink_to("second.st")
    (folder.parent / "link").symlink_to(folder)
    for place in (folder, folder.parent / "link"):
        assert open_checkpoint(place)["layers.4.w"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("inner", [".", "sub/folder"])
def test_the_links_of_a_hub_cache_are_followed(inner: str, folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--m"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0a1b" / inner
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(repository / "blobs" / f"hash{i}")
        up = "../" * (2 if inner == "." else 4)
        (snapshot / file.name).symlink_to(f"{up}blobs/{blob.name}")
    assert dict(open_checkpoint(snapshot)).keys() == TENSORS.keys()
    (snapshot / "model-00001-of-00003.safetensors").unlink()
    (snapshot / "model-00001-of-00003.safetensors").symlink_to("../blobs/gone")
    assert "which is missing" in refusal(snapshot)
    (snapshot / "model-00001-of-00003.safetensors").unlink()
    save_file({"w": torch.zeros(1)}, tmp_path / "other")
    (snapshot / "model-00001-of-00003.safetensors").symlink_to(tmp_path / "other")
    assert "a link that lies outside the folder" in refusal(snapshot)


def test_a_whole_model_beside_an_index_of_others_is_refused(folder: Path) -> None:
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    assert "holds model.safetensors, and an index that names other files" in refusal(folder)


def pickled(folder: Path, files: int = 2) -> Path:
    folder.mkdir()
    parts = [dict(list(TENSORS.items())[i::files]) for i in range(files)]
    names = [f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin" for i in range(files)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, folder / name)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_pickled_shards_are_opened_together(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m")
    torch.save({"learning_rate": 1e-4}, folder / "training_args.bin")
    opened = open_checkpoint(folder)
    assert {name: w.tolist() for name, w in opened.items()} == {name: w.tolist() for name, w in TENSORS.items()}


def test_pickled_shards_without_index_are_not_taken_for_the_whole(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m")
    (folder / "pytorch_model.bin.index.json").unlink()
    assert "holds 2 *.bin files and no pytorch_model.bin.index.json" in refusal(folder)


def test_pickled_shards_that_are_not_what_the_index_says_are_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path / "m")
    torch.save({"w": torch.zeros(1)}, folder / "pytorch_model-00002-of-00002.bin")
    assert "which does not hold it; no file does (and 3 more like it)." in refusal(folder)


def test_a_folder_of_gguf_files_names_what_is_needed(tmp_path: Path) -> None:
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(50))
    assert "holds quantised GGUF files only. Use the original float16 or bfloat16 checkpoint." in refusal(tmp_path)
    assert "it is a quantised GGUF file" in refusal(tmp_path / "model.Q4_K_M.gguf")
