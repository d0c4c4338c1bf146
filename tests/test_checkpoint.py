"""Opening checkpoints, and refusing what is none."""

import json
import os
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calmerge import CheckpointError, MissingExtra, StateDict, open_checkpoint
from calmerge._checkpoint import Checkpoint
from calmerge._hash import hash_of
from calmerge._tied import tied_names

TENSORS = {
    "w": torch.arange(12.0).reshape(4, 3),
    "half": torch.tensor([1.5, -0.0]).bfloat16(),
    "number": torch.tensor(2.5),
    "steps": torch.tensor([1, 2]),
    "on": torch.tensor([True, False]),
}


def same(weights: object, tensors: dict[str, Tensor] = TENSORS) -> bool:
    return dict(weights).keys() == tensors.keys() and all(  # type: ignore[call-overload]
        torch.equal(weights[n], t) and weights[n].dtype == t.dtype  # type: ignore[index]
        for n, t in tensors.items()
    )


def refusal(source: object) -> str:
    with pytest.raises(CheckpointError) as e:
        dict(open_checkpoint(source))  # type: ignore[arg-type]
    return str(e.value)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_folder_is_opened_however_it_is_cut(shards: int, tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    weights = open_checkpoint(write_folder(tmp_path / "m", TENSORS, shards))
    assert isinstance(weights, Checkpoint)
    assert same(weights)
    assert weights.specs["half"] == ((2,), torch.bfloat16)
    assert torch.equal(weights.read("w", slice(1, 3)), TENSORS["w"][1:3])


def test_a_single_file_of_any_name_is_opened(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "mine.safetensors")
    assert same(open_checkpoint(tmp_path / "mine.safetensors"))
    assert same(open_checkpoint(str(tmp_path / "mine.safetensors")))
    assert same(open_checkpoint(tmp_path))  # the one safetensors file of a folder


def test_a_head_beside_the_model_belongs_to_it(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"head.weight": torch.ones(1)}, tmp_path / "head.safetensors")
    assert sorted(open_checkpoint(tmp_path)) == ["head.weight", "w"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_tensors_are_opened(name: str, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / name)
    assert same(open_checkpoint(tmp_path / name))
    assert same(open_checkpoint(tmp_path))


def test_a_training_checkpoint_s_state_dict_is_found(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS}, tmp_path / "last.pt")
    assert same(open_checkpoint(tmp_path / "last.pt"))


def test_pickled_tensors_are_read_from_their_place_by_rows(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    torch.save({"w": whole, "some": whole[2:4], "tied": whole, "h": whole.half()}, tmp_path / "model.pt")
    opened = open_checkpoint(tmp_path / "model.pt")
    assert isinstance(opened, Checkpoint)
    assert opened.read("w", slice(1, 3)).tolist() == whole[1:3].tolist()
    assert opened["some"].tolist() == whole[2:4].tolist()
    assert opened["h"].dtype == torch.float16
    assert tied_names(opened) == {"tied": "w"}
    assert opened.hashes == {"model.pt": hash_of(tmp_path / "model.pt")}
    os.truncate(tmp_path / "model.pt", 200)
    with pytest.raises(CheckpointError, match=r"model\.pt: was changed while it was in use"):
        opened.read("w")


@pytest.mark.parametrize("what", ["turned", "packed", "of another order of bytes"])
def test_pickled_tensors_that_do_not_lie_as_in_memory_are_loaded(what: str, tmp_path: Path) -> None:
    w = torch.arange(6.0).reshape(2, 3)
    file, again = tmp_path / "model.pt", tmp_path / "again.pt"
    torch.save({"w": w.T.contiguous().T if what == "turned" else w}, file)
    if what != "turned":
        kind = zipfile.ZIP_DEFLATED if what == "packed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(again, "w", kind) as new:
            for name in old.namelist():
                content = old.read(name)
                if what != "packed" and name.endswith("byteorder"):
                    content = b"big"
                if what != "packed" and name.endswith("data/0"):
                    content = w.numpy().byteswap().tobytes()
                new.writestr(name, content)
        file = again
    opened = open_checkpoint(file)
    assert not isinstance(opened, Checkpoint)
    assert opened["w"].tolist() == w.tolist()


def test_mappings_modules_and_weights_are_opened() -> None:
    module = nn.Linear(2, 2)
    assert same(open_checkpoint(TENSORS))
    assert same(open_checkpoint(module), dict(module.state_dict()))
    weights = StateDict(TENSORS)
    assert open_checkpoint(weights) is weights


def test_a_module_s_tied_tensors_are_one() -> None:
    module = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
    module[1].weight = module[0].weight
    assert list(open_checkpoint(module)) == ["0.weight"]


class Payload:
    """Pickles itself as a command that makes a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1), "x": Payload(str(tmp_path / "hacked"))}, tmp_path / "model.pt")
    assert "Pickles that run code are refused" in refusal(tmp_path / "model.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    torch.save({"w": torch.zeros(1), "epoch": 3}, tmp_path / "more.pt")
    assert "holds a list, expected a mapping of tensors" in refusal(tmp_path / "list.pt")
    assert "'epoch' is a int; a checkpoint holds tensors only" in refusal(tmp_path / "more.pt")


def test_a_truncated_file_is_refused(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    file = write_folder(tmp_path / "m", TENSORS) / "model.safetensors"
    whole = file.read_bytes()
    for keep in (0, 4, 20, len(whole) - 1):
        file.write_bytes(whole[:keep])
        assert "model.safetensors: not a readable safetensors file" in refusal(tmp_path / "m")


def test_a_corrupt_header_is_refused(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    file = write_folder(tmp_path / "m", TENSORS) / "model.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    assert "not a readable safetensors file" in refusal(tmp_path / "m")


def test_a_missing_shard_is_named(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "m", TENSORS, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "names 'model-00002-of-00002.safetensors', which is missing" in refusal(folder)


@pytest.mark.parametrize("outside", ["../other.safetensors", "/etc/hostname", "sub/../../other.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(outside: str, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": outside}}))
    assert "lies outside the folder. Refused." in refusal(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": 3}}'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "not a readable index of shards" in refusal(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    folder = write_folder(tmp_path / "m", TENSORS, 2)
    save_file({"w": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    assert "tensor 'w' stands in two files, model-00001-of-00002.safetensors and model-00002-of" in refusal(folder)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert "holds 2 safetensors files and no model.safetensors.index.json" in refusal(tmp_path)


def test_an_empty_folder_says_what_was_found(tmp_path: Path) -> None:
    assert "holds no weights (*.safetensors, *.bin or *.pt); found nothing." in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "found notes.txt." in refusal(tmp_path)


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert f"no checkpoint at '{tmp_path / 'a' / 'b'}'" in refusal(tmp_path / "a" / "b")
    assert "no checkpoint at 'nowhere'" in refusal("nowhere")


def test_something_that_is_no_tensor_is_named() -> None:
    assert "'w' is a list; a checkpoint holds tensors only." in refusal({"w": [1.0]})


def hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.parametrize(
    ("source", "revision", "asked"),
    [("org/m", None, None), ("org/m@v1", None, "v1"), ("org/m", "v2", "v2"), ("org/m@v1", "v2", "v2")],
)
def test_a_hub_id_is_fetched_at_its_revision(
    source: str, revision: str | None, asked: str | None,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, write_folder: Callable[..., Path],
) -> None:  # fmt: skip
    folder, calls = write_folder(tmp_path / "m", TENSORS), []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision))
        assert not any(p.endswith((".bin", ".pt", ".py")) for p in allow_patterns)
        return str(folder)

    hub(monkeypatch, download)
    monkeypatch.chdir(tmp_path)
    assert same(open_checkpoint(source, revision=revision))
    assert calls == [("org/m", asked)]


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    hub(monkeypatch, download)
    monkeypatch.chdir(tmp_path)
    assert "'org/m' is neither a path nor a hub id that can be fetched (OSError: no network)." in refusal("org/m")


def test_without_the_hub_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingExtra, match=r"pip install 'calmerge\[hf\]'"):
        open_checkpoint("org/m")


def test_a_missing_local_path_is_not_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for source in ("./experts/cars", "../cars", "/cars", "experts/vision/cars"):
        assert "no checkpoint at" in refusal(source)


def test_the_fingerprint_and_the_hash_follow_the_file(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(2)}, file)
    before = open_checkpoint(file)
    assert isinstance(before, Checkpoint)
    first = before.fingerprint
    assert before.hashes == {"m.safetensors": hash_of(file)}
    os.utime(file, ns=(0, 0))
    assert before.fingerprint != first


def test_a_pickle_of_the_format_before_1_6_is_opened(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(open_checkpoint(tmp_path / "old.pt"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x80\x02]q\x00.", b"PK\3\4" + bytes(60)])
def test_a_broken_pickle_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    assert str(tmp_path / "model.pt") in refusal(tmp_path / "model.pt")


def test_a_tensor_without_data_or_order_is_named() -> None:
    assert "'weight' is without data" in refusal(nn.Linear(2, 2, device="meta"))
    assert "'w' is sparse; expected a dense tensor of numbers" in refusal({"w": torch.eye(2).to_sparse()})
