"""PEFT's combination types: its stored results, its cross terms, and where we do better."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calmerge import Adapter, CalmergeError, UsageError, peft, task_vectors
from calmerge.methods.peft import _Combined

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
CASES: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text())["cases"]
RENAMED = {"majority_sign_method": "majority"}
MATCH = [name for name, case in CASES.items() if case.get("expectation") == "match"]


def merged(case: dict[str, Any]) -> Any:
    tvs = task_vectors(GOLDEN / "base", {a: GOLDEN / "adapters" / a for a in case["adapters"]})
    options = {RENAMED.get(key, key): value for key, value in case["hyper_parameters"].items()}
    return peft(tvs, combination=case["method"], weights=case["weights"], **options)


@pytest.fixture(scope="module")
def stored() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


@pytest.mark.parametrize("name", MATCH)
def test_what_peft_makes(name: str, stored: dict[str, torch.Tensor]) -> None:
    case = CASES[name]
    found = merged(case)
    for tensor in found:
        expected = stored[f"{name}/delta/{tensor.removesuffix('.weight')}"]
        torch.testing.assert_close(found[tensor], expected, rtol=0, atol=case["tolerance"]["atol"])


@pytest.mark.parametrize("name", [n for n in MATCH if n != "cat" and "lora_A" in CASES[n]["compare"]])
def test_the_factors_that_peft_makes(name: str, stored: dict[str, torch.Tensor]) -> None:
    found = merged(CASES[name])
    assert isinstance(found, _Combined)
    for tensor in found:
        for part, factor in zip("AB", found.factors(tensor), strict=True):
            expected = stored[f"{name}/lora_{part}/{tensor.removesuffix('.weight')}"]
            torch.testing.assert_close(factor, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["rslora_cat", "rslora_svd"])
def test_a_merged_rslora_adapter_is_not_scaled_twice(name: str, stored: dict[str, torch.Tensor]) -> None:
    """PEFT's is sqrt(rank) too large."""
    case = CASES[name]
    found = merged(case)
    for tensor in found:
        theirs = stored[f"{name}/delta/{tensor.removesuffix('.weight')}"]
        torch.testing.assert_close(found[tensor] * case["result"]["r"] ** 0.5, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["dare_linear_seeded", "dare_linear_svd_seeded"])
def test_a_draw_keeps_the_density_and_rescales(name: str) -> None:
    tvs = task_vectors({"q.weight": torch.zeros(100, 100)}, {"a": {"q.weight": torch.ones(100, 100)}} | {
        "b": {"q.weight": torch.zeros(100, 100)}
    })  # fmt: skip
    found = peft(tvs, combination=CASES[name]["method"], density=0.4)["q.weight"]
    assert set(found.unique().tolist()) == {0.0, 2.5}
    assert abs((found > 0).float().mean() - 0.4) < 0.02


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("reject/")])
def test_what_a_careful_tool_refuses(name: str) -> None:
    with pytest.raises(CalmergeError):
        merged(CASES[name])


def pair(*numbers: tuple[float, float]) -> Any:
    """Adapters of rank 1 on one number, as (A, B)."""
    return task_vectors(
        {"q.weight": torch.zeros(1, 1)},
        {
            f"t{i}": Adapter(
                {"q.lora_A.weight": torch.tensor([[a]]), "q.lora_B.weight": torch.tensor([[b]])},
                {"r": 1, "lora_alpha": 1},
            )
            for i, (a, b) in enumerate(numbers)
        },
    )


def test_linear_has_cross_terms_and_cat_has_none() -> None:
    tvs = pair((2.0, 1.0), (1.0, 3.0))
    assert peft(tvs, combination="cat", weights=[0.5])["q.weight"].item() == 2.5
    assert peft(tvs, combination="linear", weights=[0.5])["q.weight"].item() == pytest.approx(6.0)


@pytest.mark.parametrize(("combination", "share"), [("cat", 1.0), ("svd", 1.0), ("linear", 2.0)])
def test_an_adapter_merged_with_itself(combination: str, share: float) -> None:
    tvs = pair((2.0, 1.5), (2.0, 1.5))
    found = peft(tvs, combination=combination, weights=[0.5, 0.5])["q.weight"].item()  # type: ignore[arg-type]
    assert found == pytest.approx(3 * share)


def test_a_gauge_changes_linear_and_ties_but_not_what_works_on_updates() -> None:
    one, two = pair((2.0, 1.0), (1.0, 3.0)), pair((4.0, 0.5), (1.0, 3.0))
    for combination in ("cat", "svd"):
        a, b = (peft(t, combination=combination)["q.weight"].item() for t in (one, two))  # type: ignore[arg-type]
        assert a == pytest.approx(b)
    a, b = (peft(t, combination="linear")["q.weight"].item() for t in (one, two))
    assert a != pytest.approx(b)


def test_ties_divides_by_those_that_agree_and_a_tied_vote_is_plus() -> None:
    """3, -3 and 1 give (3 + 1) / 2; 3 and -3 give 3."""
    three = pair((3.0, 1.0), (-3.0, 1.0), (1.0, 1.0))
    assert peft(three, combination="ties_svd", density=1.0)["q.weight"].item() == pytest.approx(2.0)
    two = pair((3.0, 1.0), (-3.0, 1.0))
    assert peft(two, combination="ties_svd", density=1.0)["q.weight"].item() == pytest.approx(3.0)


def test_exactly_the_density_is_kept_where_magnitudes_are_equal() -> None:
    tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": torch.ones(5)}, "b": {"w": torch.zeros(5)}})
    assert peft(tvs, combination="magnitude_prune", density=0.5)["w"].tolist() == [1, 1, 0, 0, 0]


def test_one_adapter_is_taken_as_it_is_whatever_the_type() -> None:
    tvs = pair((2.0, 1.5))
    assert peft(tvs, combination="ties", density=0.1, weights=[2.0])["q.weight"].item() == pytest.approx(6.0)


def test_different_ranks_are_refused_before_anything_is_read() -> None:
    case = CASES["reject/linear_different_ranks"]
    with pytest.raises(UsageError, match=r"'linear' adds up factors, .* they have 4, 8"):
        merged(case)
