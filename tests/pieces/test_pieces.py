"""Single steps: each against its definition, and in the rows of any block."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from calmerge import CheckpointError, StateDict, TaskVectors, task_vectors
from calmerge._random import uniform
from calmerge.pieces import blend, disjoint, drop_and_rescale, elect, pack, top_fraction, trim, unpack
from calmerge.pieces.blend import summed
from calmerge.pieces.elect import agree
from calmerge.pieces.mask import load_masks, save_masks


def vectors(**rows: list[float]) -> TaskVectors:
    n = len(next(iter(rows.values())))
    return task_vectors({"w": torch.zeros(n)}, {t: {"w": torch.tensor(r)} for t, r in rows.items()})


# trim


def test_trim_keeps_one_more_than_the_fraction_where_magnitudes_differ() -> None:
    tvs = vectors(a=[1.0, -2.0, 3.0, -4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert (trim(tvs, keep=0.2)["w"] != 0).sum() == 3
    assert trim(tvs, keep=0.5)["w"].tolist() == [[0, 0, 0, 0, 5, 6, 7, 8, 9, 10]]


def test_trim_keeps_all_that_equal_the_threshold() -> None:
    assert trim(vectors(a=[1.0, -1.0, 1.0, 0.5, 0.5]), keep=0.2)["w"].tolist() == [[1, -1, 1, 0, 0]]


def test_trim_keeps_all_at_1_and_where_the_threshold_is_0() -> None:
    assert trim(vectors(a=[1.0, 2.0]), keep=1)["w"].tolist() == [[1, 2]]
    assert trim(vectors(a=[0.0, 0.0, 0.0, 1e-6, 2.0]), keep=0.4)["w"].tolist() == [[0, 0, 0, pytest.approx(1e-6), 2]]


def test_trim_reads_the_model_for_its_threshold_once() -> None:
    reads: list[str] = []

    def note(tau: Tensor, site: object) -> Tensor:
        reads.append("read")
        return tau

    trimmed = trim(vectors(a=[1.0, 2.0, 3.0]).transform(note), keep=0.4)
    assert not reads  # nothing is done before a tensor is asked for
    trimmed["w"]
    first = len(reads)
    trimmed["w"]
    assert len(reads) == first + 1


# elect, agree, disjoint


def test_elected_signs_are_those_of_the_sum() -> None:
    assert elect(vectors(a=[3.0, -1.0], b=[-1.0, -1.0], c=[-1.0, 1.0]))["w"].tolist() == [1, -1]


def test_a_sum_of_zero_takes_the_majority_of_the_whole_model() -> None:
    base = {"u": torch.zeros(1), "v": torch.zeros(3)}
    a = {"u": torch.tensor([1.0]), "v": torch.tensor([-1.0, -2.0, 5.0])}
    b = {"u": torch.tensor([-1.0]), "v": torch.tensor([-1.0, 0.0, 0.0])}
    assert elect(task_vectors(base, {"a": a, "b": b}))["u"].tolist() == [-1]


def test_without_a_majority_the_sign_stays_0_and_counts_as_minus() -> None:
    tvs = vectors(a=[1.0, 0.0], b=[-1.0, 0.0])
    assert elect(tvs)["w"].tolist() == [0, 0]
    assert agree(tvs, elect(tvs))["w"].tolist() == [[0, 0], [-1, 0]]
    assert disjoint(tvs, elect(tvs))["w"].tolist() == [-1, 0]


@pytest.mark.parametrize(("combine", "expected"), [("mean", [2, -3]), ("sum", [4, -3]), ("max", [3, -3])])
def test_disjoint_merges_those_that_agree(combine: str, expected: list[float]) -> None:
    tvs = vectors(a=[3.0, 2.0], b=[1.0, -3.0], c=[-1.0, 0.0])
    assert disjoint(tvs, elect(tvs), combine=combine)["w"].tolist() == expected  # type: ignore[arg-type]


def test_disjoint_does_not_divide_by_zeros() -> None:
    tvs = vectors(a=[4.0, 0.0], b=[0.0, 0.0], c=[2.0, 0.0])
    assert disjoint(tvs, elect(tvs))["w"].tolist() == [3, 0]


# blend


def test_blend_weighs_tasks_and_tensors() -> None:
    base = {"u": torch.zeros(1), "v": torch.zeros(1)}
    experts = {t: {"u": torch.tensor([x]), "v": torch.tensor([10 * x])} for t, x in {"a": 1.0, "b": 2.0}.items()}
    lam = {"u": torch.tensor([1.0, 1.0]), "v": torch.tensor([0.5, 0.0])}
    merged = blend(task_vectors(base, experts), lambda name: lam[name])
    assert (merged["u"].item(), merged["v"].item()) == (3.0, 5.0)


def test_blend_lets_gradients_flow_to_its_coefficients() -> None:
    lam = torch.tensor([0.5, 0.5], requires_grad=True)
    blend(vectors(a=[1.0, 2.0], b=[-1.0, 3.0]), lam)["w"].sum().backward()
    assert lam.grad.tolist() == [3.0, 2.0]


def test_sums_do_not_depend_on_how_many_entries_are_summed_at_once() -> None:
    tau = uniform((7, 1001), "sum") - 0.5
    whole = summed(tau)
    for step in (1, 3, 64):
        parts = [summed(tau[:, i : i + step]) for i in range(0, 1001, step)]
        assert torch.equal(torch.cat(parts), whole)


# drop


def test_drop_and_rescale_is_unbiased_and_exact() -> None:
    dropped = drop_and_rescale(vectors(a=[1.0] * 100_000), rate=0.9)["w"]
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / (1 - 0.9)).item()}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.04)  # four standard errors


def test_drop_only_does_not_rescale() -> None:
    dropped = drop_and_rescale(vectors(a=[1.0] * 100_000), rate=0.9, rescale=False)["w"]
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert dropped.mean().item() == pytest.approx(0.1, abs=0.004)


# masks


def test_the_top_fraction_counts_over_all_tensors_together() -> None:
    weights = StateDict({"a": torch.tensor([9.0, -8.0, 7.0]), "b": torch.tensor([1.0, -2.0, 3.0])})
    assert top_fraction(weights, 0.5) == 7.0
    assert top_fraction(weights, 1.0) == 1.0
    assert top_fraction(weights, 0.1) == float("inf")  # floor(0.1 * 6) = 0: no entry exceeds it


@pytest.mark.parametrize("shape", [(), (1,), (8,), (9,), (3, 5), (0, 4), (2, 3, 4)])
def test_packed_masks_take_one_bit_an_entry_and_come_back(shape: tuple[int, ...]) -> None:
    mask = uniform(shape, "mask") < 0.3
    bits = pack(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpack(bits, shape), mask)


def test_saved_masks_come_back_and_are_small(tmp_path: Path) -> None:
    masks = {"w": uniform((100, 80), "w") < 0.01, "b": torch.tensor([True]), "none": torch.zeros(0, 2).bool()}
    save_masks(tmp_path / "m.safetensors", masks)
    loaded = load_masks(tmp_path / "m.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[n], m) and loaded[n].dtype == torch.bool for n, m in masks.items())
    assert (tmp_path / "m.safetensors").stat().st_size < 100 * 80 / 8 + 500


@pytest.mark.parametrize("content", [b"", b"not a mask"])
def test_a_file_that_holds_no_masks_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"m.safetensors: no file of packed masks"):
        load_masks(tmp_path / "m.safetensors")


def test_a_checkpoint_is_no_file_of_masks(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="no file of packed masks"):
        load_masks(tmp_path / "m.safetensors")


def test_the_first_entry_is_the_highest_bit() -> None:
    assert pack(torch.tensor([True] + [False] * 8)).tolist() == [128, 0]
    assert np.unpackbits(pack(torch.tensor([False, True])).numpy()).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
