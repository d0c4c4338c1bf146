"""TSV-Compress: experts as thin factors, saved and read again."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calmerge import TaskVectors, UsageError, export, open_checkpoint, open_merged, save, task_vectors, tsv_c
from calmerge._random import uniform
from calmerge.pieces.spectral import svd

near = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
SHAPES = {"fc.weight": (20, 30), "fc.bias": (30,), "text_projection": (16, 16), "thin.weight": (30, 1)}


def noise(*shape: int, key: object = 0) -> Tensor:
    return uniform(shape, "tsv_c", key) - 0.5


def vectors() -> TaskVectors:
    experts = {t: {n: noise(*s, key=(t, n)) for n, s in SHAPES.items()} for t in "ab"}
    return task_vectors({n: torch.zeros(s) for n, s in SHAPES.items()}, experts)


def test_each_task_keeps_its_leading_triples() -> None:
    bank, tvs = tsv_c(vectors(), keep=0.2), vectors()
    for i, task in enumerate("ab"):
        delta = bank.for_task(task)
        near(delta["fc.weight"], svd(tvs["fc.weight"][i], 4).product().float())
        near(delta["text_projection"], svd(tvs["text_projection"][i], 3).product().float())
        for whole in ("fc.bias", "thin.weight"):  # a factor of one column would be no smaller
            assert torch.equal(delta[whole], tvs[whole][i])


def test_it_takes_the_space_of_its_factors() -> None:
    bank = tsv_c(vectors(), keep=0.2)
    assert bank.nbytes == 2 * 4 * (4 * (20 + 30) + 30 + 3 * (16 + 16) + 30)


def test_all_of_the_rank_is_kept_whole() -> None:
    bank, tvs = tsv_c(vectors(), keep=1.0), vectors()
    assert all(torch.equal(bank.for_task("b")[n], tvs[n][1]) for n in tvs)


def test_an_update_of_lower_rank_fills_up_with_zeros() -> None:
    low = noise(9, 1) @ noise(1, 9, key=1)
    tvs = task_vectors({"w": torch.zeros(9, 9)}, {"a": {"w": low}})
    bank = tsv_c(tvs, keep=0.35)
    assert bank.patches["a"].stored["left/w"].shape == (9, 3)
    near(bank.for_task("a")["w"], low)


def test_matrices_can_be_left_whole() -> None:
    tvs = vectors()
    assert torch.equal(tsv_c(tvs, skip=["text_*"]).for_task("a")["text_projection"], tvs["text_projection"][0])
    with pytest.raises(UsageError, match="skip: 'txt' fits no tensor"):
        tsv_c(tvs, skip=["txt"])


def test_a_saved_bank_is_read_again_and_exported(tmp_path: Path) -> None:
    tvs = vectors()
    bank = tsv_c(tvs, keep=0.2)
    manifest = save(tmp_path / "bank", tvs, bank)
    assert manifest["merged"] == len(SHAPES)
    assert manifest["storage"]["shared"] == 0
    assert sum(manifest["storage"]["patches"].values()) == bank.nbytes
    again = open_merged(tmp_path / "bank")
    for task in "ab":
        assert set(again.for_task(task)) == set(SHAPES)
        assert all(torch.equal(again.for_task(task)[n], bank.for_task(task)[n]) for n in SHAPES)
    export(tmp_path / "bank", "a", tmp_path / "a")
    exported = open_checkpoint(tmp_path / "a")
    assert all(torch.equal(exported[n], bank.for_task("a")[n]) for n in SHAPES)
