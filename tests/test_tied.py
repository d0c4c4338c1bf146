"""Tied tensors: one tensor, merged and written once."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import calmerge as cm
from calmerge._plan import plan
from calmerge._save import to_write


def model(value: float, *, tied: bool = True) -> dict[str, Tensor]:
    embedding = torch.full((4, 2), value)
    output = embedding if tied else embedding.clone()
    return {"model.embed_tokens.weight": embedding, "model.w": torch.full((3,), value), "lm_head.weight": output}


@pytest.fixture
def stored(tmp_path: Path, write_folder: Callable[..., Path]) -> Callable[..., Path]:
    """A folder with both embeddings in its file, and a configuration."""

    def write(name: str, value: float, *, head: float | None = None, **config: object) -> Path:
        tensors = model(value, tied=False)
        if head is not None:
            tensors["lm_head.weight"] = torch.full((4, 2), head)
        folder = write_folder(tmp_path / name, tensors)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


def test_tensors_that_share_storage_are_one() -> None:
    tvs = cm.task_vectors(model(0.0), {"a": model(1.0), "b": model(3.0)})
    assert list(tvs) == ["model.embed_tokens.weight", "model.w"]
    assert tvs.skipped == {"lm_head.weight": "tied to 'model.embed_tokens.weight', written once"}
    assert tvs.numel == 8 + 3
    assert tvs.heads == {"a": {}, "b": {}}


def test_a_pickle_with_both_names_is_written_as_save_pretrained_would(tmp_path: Path) -> None:
    for name, value in {"base": 0.0, "a": 1.0}.items():
        torch.save(model(value), tmp_path / f"{name}.pt")
    tvs = cm.task_vectors(tmp_path / "base.pt", {"a": tmp_path / "a.pt"})
    cm.save(tmp_path / "out", tvs, cm.average(tvs))
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == ["model.embed_tokens.weight", "model.w"]
    assert plan(*to_write(tvs, cm.average(tvs))).writes == 4 * (8 + 3)


def test_views_of_one_storage_that_differ_are_not_tied() -> None:
    whole = torch.arange(8.0)
    tvs = cm.task_vectors(
        {"a": whole[:4], "b": whole[4:], "c": whole[:2]}, {"x": {"a": whole[:4], "b": whole[4:], "c": whole[:2]}}
    )
    assert list(tvs) == ["a", "b", "c"]


def test_stored_twice_is_once_where_the_configuration_says_so(stored: Callable[..., Path], tmp_path: Path) -> None:
    base = stored("base", 0.0, tie_word_embeddings=True)
    tvs = cm.task_vectors(base, {"a": stored("a", 1.0, tie_word_embeddings=True)})
    assert list(tvs) == ["model.embed_tokens.weight", "model.w"]
    assert tvs.heads == {"a": {}}
    cm.save(tmp_path / "out", tvs, cm.average(tvs))
    assert "lm_head.weight" not in cm.open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": False}])
def test_without_the_configuration_both_are_merged(config: dict[str, bool], stored: Callable[..., Path]) -> None:
    tvs = cm.task_vectors(stored("base", 0.0, **config), {"a": stored("a", 1.0, **config)})
    assert "lm_head.weight" in tvs


def test_the_language_part_may_say_it(stored: Callable[..., Path]) -> None:
    config = {"text_config": {"tie_word_embeddings": True}}
    tvs = cm.task_vectors(stored("base", 0.0, **config), {"a": stored("a", 1.0, **config)})
    assert "lm_head.weight" not in tvs


def test_an_expert_that_untied_its_output_keeps_it_as_a_head(stored: Callable[..., Path]) -> None:
    base = stored("base", 0.0, tie_word_embeddings=True)
    own = stored("a", 1.0, head=5.0, tie_word_embeddings=False)
    tvs = cm.task_vectors(base, {"a": own, "b": model(2.0, tied=False)})
    assert tvs.heads["a"]["lm_head.weight"].eq(5).all()
    assert not tvs.heads["b"]  # its double is equal, and so no tensor of its own


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("head", [1.0, 5.0])
def test_where_no_configuration_tells_the_values_do(
    name: str, head: float, stored: Callable[..., Path], tmp_path: Path
) -> None:
    own = {**model(1.0, tied=False), "lm_head.weight": torch.full((4, 2), head)}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (save_file if name.endswith("safetensors") else torch.save)(own, tmp_path / "a" / name)
    tvs = cm.task_vectors(stored("base", 0.0, tie_word_embeddings=True), {"a": tmp_path / "a"})
    assert list(tvs.heads["a"]) == (["lm_head.weight"] if head == 5 else [])


def test_a_model_in_memory_comes_back_with_both_names_on_one_tensor() -> None:
    merged = cm.merge(model(0.0), [model(1.0), model(3.0)], "average")
    assert list(merged) == ["model.embed_tokens.weight", "model.w", "lm_head.weight"]
    assert merged["lm_head.weight"].data_ptr() == merged["model.embed_tokens.weight"].data_ptr()
    assert merged["lm_head.weight"].eq(2).all()


def test_shared_embeddings_of_an_encoder_and_decoder(
    stored: Callable[..., Path], write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    names = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head", "decoder.block"]
    for place in ("base", "a"):
        folder = write_folder(tmp_path / place, {f"{n}.weight": torch.full((4, 2), float(place == "a")) for n in names})
        (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    tvs = cm.task_vectors(tmp_path / "base", {"a": tmp_path / "a"})
    assert list(tvs) == ["decoder.block.weight", "shared.weight"]
