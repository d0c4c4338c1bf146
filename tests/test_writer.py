"""Written files: the same bytes however they are computed, and nothing half-written ever."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import calmerge as cm
from calmerge import StateDict, UsageError
from calmerge._random import uniform
from calmerge._writer import write_weights

SHAPES = {"a": (37, 5), "b": (3,), "c": (), "d": (64, 9), "e": (0, 4)}


def weights() -> StateDict:
    tensors = {name: uniform(shape, name) for name, shape in SHAPES.items()}
    return StateDict(tensors | {"f": torch.arange(5), "g": uniform((8, 8), "g").bfloat16()})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    write_weights(tmp_path, weights())
    read = load_file(tmp_path / "model.safetensors")
    for name, tensor in weights().items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype


@pytest.mark.parametrize("chunk", [2**4, 2**10, 2**20])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_same_bytes_for_any_chunk_and_threads(chunk: int, threads: int, tmp_path: Path) -> None:
    for folder, options in {"one": {}, "other": {"chunk": chunk, "threads": threads}}.items():
        (tmp_path / folder).mkdir()
        tvs = cm.task_vectors(weights(), {"x": weights(), "y": {n: 2 * w for n, w in weights().items()}})
        write_weights(tmp_path / folder, cm.add(tvs.base, cm.ties(tvs, keep=0.3)), **options)  # type: ignore[arg-type]
    first, second = (tmp_path / f / "model.safetensors" for f in ("one", "other"))
    assert first.read_bytes() == second.read_bytes()


def test_shards_hold_the_same_tensors_and_open_as_one(tmp_path: Path) -> None:
    files = write_weights(tmp_path, weights(), shard=1000)
    assert len(files) > 2
    opened = cm.open_checkpoint(tmp_path)
    for name, tensor in weights().items():
        assert torch.equal(opened[name], tensor)


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    from calmerge._hash import hash_of

    files = write_weights(tmp_path, weights())
    assert files == {"model.safetensors": hash_of(tmp_path / "model.safetensors")}


def test_a_size_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="shard must be a size like 5GB or 500MB, got 'big'"):
        write_weights(tmp_path, weights(), shard="big")
