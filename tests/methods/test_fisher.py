"""Fisher merging: the sheet's checks and traps, and FusionBench's averages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from calmerge import Run, StateDict, UsageError, average, fisher, task_vectors
from calmerge.fitting.calibrate import fisher_diagonals
from calmerge.methods.fisher import fisher_average
from calmerge.tasks.base import Task, Tasks

GOLDEN = Path(__file__).parents[1] / "golden" / "fusion_bench"


def pair(one: list[float], two: list[float]) -> Any:
    return task_vectors({"w": torch.zeros(len(one))}, {"a": {"w": torch.tensor(one)}, "b": {"w": torch.tensor(two)}})


def weighted(diagonals: list[list[float]], one: list[float], two: list[float], **options: Any) -> Tensor:
    return fisher_average(pair(one, two), StateDict({"w": torch.tensor(diagonals)}), **options)["w"]


def test_entries_are_weighted_by_their_fisher() -> None:
    assert weighted([[3.0], [1.0]], [1.0], [3.0], normalise=False).item() == pytest.approx(1.5)


def test_norm_equalisation_weighs_experts_alike() -> None:
    found = weighted([[4.0, 2.0], [1.0, 2.0]], [1.0, 1.0], [3.0, 3.0], normalise=False)
    assert found.tolist() == pytest.approx([1.4, 2.0], abs=1e-5)
    found = weighted([[4.0, 2.0], [1.0, 2.0]], [1.0, 1.0], [3.0, 3.0])
    assert found.tolist() == pytest.approx([1.6667, 2.3333], abs=1e-4)


def test_no_fisher_at_all_gives_the_plain_mean() -> None:
    assert weighted([[0.0], [0.0]], [1.0], [3.0], normalise=False).item() == pytest.approx(2.0)


def test_the_scale_of_all_fishers_does_not_matter() -> None:
    found = [weighted([[4.0 * c, 2.0 * c], [1.0 * c, 2.0 * c]], [1.0, 1.0], [3.0, 3.0]).tolist() for c in (1.0, 1000.0)]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_the_floor_decides_where_fishers_are_tiny() -> None:
    """Long-trained experts have Fishers near 1e-8: the plain average comes out, and the share is reported."""
    found = weighted([[3e-9], [1e-9]], [1.0], [3.0], normalise=False)
    assert found.item() == pytest.approx(2.0, abs=2e-3)


class Logit:
    """Two classes with logits (w x, 0): the Fisher of w is p (1 - p) x^2."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: str) -> Tensor:
        z = inputs[:, 0] * weights["w"]
        return torch.stack([z, torch.zeros_like(z)], 1)


def one_weight(tmp_path: Path, *, batched: bool) -> float:
    """p = 0.8 at w = ln 4, x = 1."""
    tvs = task_vectors({"w": torch.tensor(0.0)}, {"a": {"w": torch.tensor(4.0).log()}})
    tasks = Tasks(Logit(), {"a": Task(DataLoader(TensorDataset(torch.ones(1, 1))))})
    found = fisher_diagonals(tvs, tasks, tmp_path, examples=1, batched=batched, batch=1, seed=0, run=Run())
    return found["w"].item()


def test_the_exact_estimator_is_the_definition(tmp_path: Path) -> None:
    assert one_weight(tmp_path, batched=False) == pytest.approx(0.16, abs=1e-6)


def test_the_batched_estimator_adds_cross_terms(tmp_path: Path) -> None:
    """The gradient of sum_c sqrt(p_c) log p_c is sqrt(.8) * .2 - sqrt(.2) * .8 = -0.1789, squared 0.032."""
    assert one_weight(tmp_path, batched=True) == pytest.approx(0.032, abs=1e-5)


def test_a_tensor_without_gradient_is_averaged(toy: Any) -> None:
    found = fisher(toy.tvs, tasks=toy.tasks, examples=2, normalise=False)
    torch.testing.assert_close(found["unused"], average(toy.tvs)["unused"])


def test_the_share_below_the_floor_is_reported(toy: Any) -> None:
    run = Run()
    fisher(toy.tvs, tasks=toy.tasks, examples=2, run=run)
    (share,) = run.trace["fisher"].numbers.values()
    assert 3 / toy.tvs.numel <= share < 0.5  # the unused tensor's three entries at least


def test_coefficients_are_one_for_each_expert(toy: Any) -> None:
    with pytest.raises(UsageError, match=r"fisher.coefficients must be 4 numbers, one for each expert, got \[0.5\]"):
        fisher(toy.tvs, tasks=toy.tasks, coefficients=[0.5])


@pytest.mark.parametrize("case", ["fisher_raw_T3", "fisher_normalized_T3"])
def test_averages_as_fusion_bench(case: str) -> None:
    described = json.loads((GOLDEN / case / "case.json").read_text())
    given = load_file((GOLDEN / case / described["inputs"]).resolve())
    extra = load_file((GOLDEN / case / described["extra_inputs"]).resolve())
    part = lambda d, p: {n.removeprefix(p): w for n, w in d.items() if n.startswith(p)}  # noqa: E731
    tvs = task_vectors(part(given, "base/"), {str(t): part(given, f"expert_{t}/") for t in (1, 2, 3)})
    diagonals = StateDict({n: torch.stack([extra[f"fisher_{t}/{n}"] for t in (1, 2, 3)]) for n in tvs})
    options = described["hyper_parameters"]
    found = fisher_average(
        tvs, diagonals, coefficients=options["coefficients"], normalise=options["normalize_fisher_weight"]
    )
    for name, stored in load_file(GOLDEN / case / "output.safetensors").items():
        if name in found:
            torch.testing.assert_close(tvs.base[name] + found[name], stored, **described["tolerance"])
