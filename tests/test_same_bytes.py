"""The bytes of a merge follow from inputs and options: not from chunk, threads, or how files are cut."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmerge as cm
from calmerge import StateDict, TaskVectors, Weights, open_checkpoint, task_vectors
from calmerge._measure import settle, total
from calmerge._random import uniform
from calmerge._writer import write_weights
from calmerge.pieces import blend, trim

SHAPES = {"wide": (300, 500), "tall": (1500, 60), "vector": (2000,), "cube": (9, 8, 7), "number": (), "none": (0, 5)}


def model(name: str) -> dict[str, Tensor]:
    base = {n: uniform(shape, n) - 0.5 for n, shape in SHAPES.items()}
    moved = {n: w + 0.05 * (uniform(SHAPES[n], n, name) - 0.5) for n, w in base.items()}
    return {n: w.bfloat16() for n, w in (base if name == "base" else moved).items()}


def normed(tvs: TaskVectors) -> Weights:
    """A sum divided by a norm of the whole model: its last bit shows in which order the norm was added up."""
    norm = total(tvs, lambda tau: tau.double().square().sum())
    return blend(tvs, torch.ones(3)).map(lambda w, n, site: w / n.sqrt().float(), norm)


METHODS = {
    "A: average": cm.average,
    "A: dare": partial(cm.dare, rate=0.6),
    "A by rows: della": cm.della,
    "B: tsv_m": cm.tsv_m,
    "C: ties": partial(cm.ties, keep=0.3),
    "C: ties by tensor": partial(cm.ties, keep=0.3, scope="tensor"),
    "C: sce": partial(cm.sce, select_topk=0.4),
    "C: norm": normed,
    "C and B: trim, TSV-M": lambda tvs: cm.tsv_m(trim(tvs, keep=0.5)),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    for name in ("base", "x", "y", "z"):
        for cut, shard in {"whole": "5GB", "cut": 70_000}.items():
            (place / cut / name).mkdir(parents=True)
            write_weights(place / cut / name, StateDict(model(name)), shard=shard)
    return place


def written(method: Any, place: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    out.mkdir()
    tvs = task_vectors(place / "base", {t: place / t for t in ("x", "y", "z")})
    write_weights(out, cm.add(tvs.base, method(tvs), dtype=torch.float32), **options)
    return dict(open_checkpoint(out))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_same_bytes_for_any_chunk_threads_and_sharding(method: Any, inputs: Path, tmp_path: Path) -> None:
    first = written(method, inputs / "whole", tmp_path / "first", threads=1)
    ways = [(2**10, 2, "whole", "5GB"), (2**13, 3, "cut", "5GB"), (2**16, 4, "whole", 90_000), (2**20, 1, "cut", 1)]
    for i, (chunk, threads, cut, shard) in enumerate(ways):
        other = written(method, inputs / cut, tmp_path / str(i), chunk=chunk, threads=threads, shard=shard)
        assert first.keys() == other.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor.view(torch.int32), other[name].view(torch.int32)), (name, chunk, threads, cut)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_sums_have_one_order_of_blocks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = StateDict({"a": uniform((700, 900), "a"), "b": uniform((700, 900), "b")})
    number = total(weights, lambda w: w.sum())  # in float32 within a block, where the order shows
    settle([number], threads=threads)
    blocks = [w[i : i + 145].sum().double() for w in weights.values() for i in range(0, 700, 145)]
    assert number.value().item() == sum(blocks[1:], start=blocks[0]).item()
