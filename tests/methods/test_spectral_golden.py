"""The spectral methods against FusionBench 0.2.33: inputs and outputs stored as plain data (../golden)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calmerge import (
    TaskVectors,
    add,
    doge,
    iso_c,
    iso_cts,
    knots,
    model_stock,
    svc,
    task_arithmetic,
    task_vectors,
    ties,
    tsv_m,
    wudi,
)

FOLDER = Path(__file__).parents[1] / "golden" / "fusion_bench"
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def inputs(n: int) -> TaskVectors:
    tensors = load_file(FOLDER / f"inputs_T{n}.safetensors")
    return task_vectors(part(tensors, "base/"), {str(t): part(tensors, f"expert_{t}/") for t in range(1, n + 1)})


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("tsvm_T3_alpha", partial(tsv_m, scale=0.8)),
        ("tsvm_T5", tsv_m),
        ("tsvm_eigen_T3", tsv_m),
        ("iso_c_T3", partial(iso_c, scale=1.5)),
        ("iso_c_T5", partial(iso_c, scale=1.5)),
        ("iso_c_T5", partial(iso_c, scale=1.5, rank="full")),
        ("iso_cts_T3", partial(iso_cts, scale=1.2)),
        ("iso_cts_T5", partial(iso_cts, scale=1.2)),
        ("iso_cts_fraction_T3", partial(iso_cts, common=0.5, skip=["*position_embedding*"])),
        ("wudi_T3", wudi),
        ("wudi_T5", wudi),
        ("wudi_short_T3", partial(wudi, steps=10, skip=["*position_embedding*"])),
        ("doge_ta_T3", partial(doge, skip=["*embeddings*"])),
        ("doge_ta_T5", partial(doge, keep=0.2, subspace=4, skip=["*embeddings*"])),
        ("model_stock_T3", partial(model_stock, angle="mean_angle", clamp=False)),
    ],
)
def test_merges_as_the_reference(case: str, method: Callable[..., Any], golden: Golden) -> None:
    described, stored = golden(case)
    tvs = inputs(described["T"])
    merged = add(tvs.base, method(tvs))
    assert set(merged) == set(stored)
    for name, tensor in stored.items():
        torch.testing.assert_close(merged[name].float(), tensor.float(), **described["tolerance"])


@pytest.mark.parametrize("alpha", ["0p1", "1p0"])
def test_calibrates_as_the_reference(alpha: str, golden: Golden) -> None:
    described, stored = golden(f"svc_task_arithmetic_alpha{alpha}_T3")
    tvs = inputs(3)
    calibrated = add(tvs.base, svc(task_arithmetic(tvs, scale=0.3), tvs, alpha=float(alpha.replace("p", "."))))
    assert set(calibrated) == set(stored)
    for name, tensor in stored.items():
        torch.testing.assert_close(calibrated[name].float(), tensor.float(), **described["tolerance"])


def test_calibrates_as_the_reference_s_loop(golden: Golden) -> None:
    described, stored = golden("svc_loop_T3")
    tvs = inputs(3)
    calibrated = add(tvs.base, svc(task_arithmetic(tvs, scale=0.3), tvs))
    for name, tensor in stored.items():
        torch.testing.assert_close(calibrated[name], tensor, **described["tolerance"])


def test_aligns_as_the_reference(golden: Golden) -> None:
    described, stored = golden("knots_ties_T3")
    experts = {str(t): part(stored, f"delta_{t}/") for t in (1, 2, 3)}
    tvs = task_vectors({n: torch.zeros_like(d) for n, d in experts["1"].items()}, experts)
    merged = knots(tvs, inner=partial(ties, keep=0.2, scale=0.6), rank=4, tolerance=1e-4)
    for name, tensor in part(stored, "merged_delta/").items():
        torch.testing.assert_close(merged[name], tensor, **described["tolerance"])
