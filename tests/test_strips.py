"""Loops that have tapes played strip after strip find what passes over blocks find, to the bit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import calmerge
from calmerge import StateDict, TaskVectors, _compiled, task_vectors
from calmerge import _rank as rank_file
from calmerge import _threshold as threshold_file
from calmerge._errors import CheckpointError
from calmerge._measure import Measure, settle
from calmerge._passes import Sample
from calmerge._random import uniform
from calmerge._reader import Reader
from calmerge._threshold import Threshold, whole_sum
from calmerge._weights import ALL
from calmerge._writer import write_weights
from calmerge.pieces import largest_sums as sums_file
from calmerge.pieces.largest_sums import largest_and_sums

SHAPES = {"wide": (500, 700), "long": (20, 9000), "vector": (40_000,)}


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small vectors count as large ones."""
    pytest.importorskip("numba")
    monkeypatch.setattr(_compiled, "LARGE", 0)
    monkeypatch.setattr(rank_file, "_GATHERED", 3000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for model in ("base", "x", "y", "z"):
        (place / model).mkdir()
        tensors = {n: uniform(s, n) - 0.5 + 0.05 * (uniform(s, n, model) - 0.5) for n, s in SHAPES.items()}
        write_weights(place / model, StateDict({n: w.bfloat16() for n, w in tensors.items()}), shard=700_000)
    return place


@pytest.fixture(params=["files", "memory"])
def tvs(request: pytest.FixtureRequest, place: Path) -> TaskVectors:
    models = {m: place / m for m in ("base", "x", "y", "z")}
    if request.param == "files":
        return task_vectors(models["base"], {t: models[t] for t in "xyz"})
    held = {m: dict(calmerge.open_checkpoint(path)) for m, path in models.items()}
    return task_vectors(held["base"], {t: held[t] for t in "xyz"})


def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (threshold_file, sums_file):
        monkeypatch.setattr(module, "strips", lambda: None)
    monkeypatch.setattr(Reader, "windows", lambda *_: None)


def selected(tvs: TaskVectors) -> list[Measure]:
    _, found = largest_and_sums(
        tvs.reduce(lambda tau, site: tau.abs().amax(0)), 0.4, tvs.transform(lambda tau, site: tau.square())
    )
    return list(found.measures.values())


def counted(tvs: TaskVectors) -> list[Measure]:
    threshold = Threshold(tvs, int(0.8 * tvs.numel))

    def above(tau: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return (tau.abs() >= at.reshape(-1, *[1] * (tau.dim() - 1))).float().sum(0)

    return [threshold, threshold.total(above, tvs.reduce(lambda tau, at, site: above(tau, at), threshold))]


@pytest.mark.parametrize("measures", [selected, counted])
def test_the_same_bits_by_strips_and_by_blocks(
    measures: Callable[[TaskVectors], list[Measure]], tvs: TaskVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> list[list[float]]:
        made = measures(tvs)
        settle(made, threads=2)
        return [one.value().flatten().tolist() for one in made]

    strips = found()
    by_blocks(monkeypatch)
    blocks = found()
    monkeypatch.setattr(_compiled, "LARGE", 1 << 60)
    assert strips == blocks == found()


def test_a_window_is_the_first_entries_of_some_rows(place: Path) -> None:
    tvs = task_vectors(place / "base", {t: place / t for t in "xyz"})
    rows, most = [slice(3, 5), slice(490, 500)], [800, 6999]
    read = Reader([tvs], taping=True).windows("wide", rows, most)
    assert read is not None
    for one, some, n in zip(read, rows, most, strict=True):
        assert torch.equal(one, tvs.read("wide", some).reshape(3, -1)[:, :n])


def test_a_sample_is_the_same_by_windows_and_by_torch(place: Path) -> None:
    tvs = task_vectors(place / "base", {t: place / t for t in "xyz"})
    look: Sample = rank_file.sample(tvs, 3)
    taped, plain = look.taken(taping=True), look.taken(taping=False)
    assert len(taped) == len(plain)
    assert all(np.array_equal(a, b) for a, b in zip(taped, plain, strict=True))


def test_there_are_no_windows_of_what_lies_in_memory(place: Path) -> None:
    held = StateDict({"w": uniform((500, 700), "w") - 0.5})
    assert Reader([held.map(lambda w, site: 2 * w)], taping=True).windows("w", [slice(0, 2)], [10]) is None


@pytest.mark.parametrize("measures", [selected, counted])
def test_an_entry_that_is_no_number_is_told_by_its_tensor_and_expert(
    measures: Callable[[TaskVectors], list[Measure]], place: Path, tmp_path: Path
) -> None:
    broken = {n: w.clone() for n, w in calmerge.open_checkpoint(place / "y").items()}
    broken["wide"][400, 3] = torch.nan
    write_weights(tmp_path, StateDict(broken))
    tvs = task_vectors(place / "base", {"x": place / "x", "y": tmp_path})
    with pytest.raises(CheckpointError, match=r"expert 'y'.*wide"):
        settle(measures(tvs))


def test_differences_that_overflow_are_left_to_torch_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and expert are finite there, so that it is no error; sizes lie so far apart that sums are rounded."""
    base = {"w": uniform((500, 700), "w") - 0.5}
    base["w"][400, 3] = -3e38
    for model, size in (("base", 0.0), ("x", 0.1), ("y", 0.2)):
        (tmp_path / model).mkdir()
        tensor = base["w"] + size * (20 * (uniform((500, 700), model) - 0.5)).exp()
        tensor[400, 3] = -3e38 if model == "base" else 3e38
        write_weights(tmp_path / model, StateDict({"w": tensor}))
    tvs = task_vectors(tmp_path / "base", {t: tmp_path / t for t in "xy"})

    def found() -> list[float]:
        (one,) = selected(tvs.transform(lambda tau, site: tau.clamp(-1e6, 1e6)))
        return one.value().tolist()

    strips = found()
    by_blocks(monkeypatch)
    assert strips == found()


def test_whole_numbers_below_zero_are_added_too(tvs: TaskVectors) -> None:
    threshold = Threshold(tvs, 1000)
    signs = tvs.reduce(lambda tau, site: tau.sum(0).sign())
    number = threshold.total(lambda tau, at: tau.sum(0).sign(), signs)
    assert number.value().item() == sum(whole_sum(signs.read(n, ALL)).item() for n in SHAPES)
