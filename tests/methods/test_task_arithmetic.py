"""Task Arithmetic."""

import pytest
import torch

from calmerge import StateDict, TaskVectors, add, task_arithmetic, task_vectors

BASE = {"w": torch.tensor([1.0])}
EXPERTS = {t: {"w": torch.tensor([x])} for t, x in {"a": 1.4, "b": 1.2, "c": 0.9}.items()}


def tvs() -> TaskVectors:
    return task_vectors(BASE, EXPERTS)


def test_the_worked_example() -> None:
    assert add(StateDict(BASE), task_arithmetic(tvs(), scale=0.3))["w"].item() == pytest.approx(1.15, abs=1e-6)


def test_scale_0_returns_the_base_bit_for_bit_integer_tensors_too() -> None:
    base = BASE | {"steps": torch.tensor([3]), "minus": torch.tensor([-0.0])}
    experts = {"a": {"w": torch.tensor([7.0]), "steps": torch.tensor([9]), "minus": torch.tensor([1.0])}}
    vectors = task_vectors(base, experts)
    merged = add(vectors.base, task_arithmetic(vectors, scale=0.0))
    assert merged["steps"].tolist() == [3]
    assert (merged["w"].item(), merged["minus"].signbit().item()) == (1.0, True)


def test_one_expert_at_scale_1_is_the_expert() -> None:
    vectors = tvs().only(["b"])
    assert add(vectors.base, task_arithmetic(vectors, scale=1.0))["w"].item() == EXPERTS["b"]["w"].item()


def test_the_sum_grows_with_the_number_of_experts() -> None:
    same = task_vectors({"w": torch.zeros(1)}, {str(t): {"w": torch.ones(1)} for t in range(8)})
    assert task_arithmetic(same, scale=0.5)["w"].item() == 4.0


def test_negation_takes_the_task_away_and_twice_gives_it_back() -> None:
    vectors = tvs().only(["a"])
    away = task_arithmetic(vectors, scale=-1.0)
    assert away["w"].item() == -vectors["w"].item()
    again = task_arithmetic(vectors.transform(lambda tau, site: -tau), scale=-1.0)
    assert again["w"].item() == vectors["w"].item()


def test_an_analogy_of_equal_experts_returns_the_third() -> None:
    """C + B - A with A equal to B."""
    vectors = task_vectors(BASE, {"a": EXPERTS["b"], "b": EXPERTS["b"], "c": EXPERTS["c"]})
    signed = vectors.transform(lambda tau, site: tau * torch.tensor([-1.0, 1.0, 1.0])[:, None])
    assert task_arithmetic(signed, scale=1.0)["w"].item() == pytest.approx(vectors.of("c")["w"].item(), abs=1e-7)


def test_eight_small_deltas_in_bfloat16_are_added_in_float32() -> None:
    """Adding 2^-10 to 1.0 eight times in bfloat16 stays at 1.0; the sum 2^-7 added once does not."""
    base = {"w": torch.tensor([1.0]).bfloat16()}
    ones = task_vectors(base, {str(t): base for t in range(8)}).transform(lambda tau, site: tau + 2**-10)
    assert add(ones.base, task_arithmetic(ones, scale=1.0))["w"].item() == 1.0078125


def test_float16_experts_are_subtracted_in_float32() -> None:
    base = {"w": torch.tensor([2048.0]).half()}
    vectors = task_vectors(base, {"a": {"w": torch.tensor([2050.0]).half()}, "b": {"w": torch.tensor([1.0]).half()}})
    assert vectors["w"].flatten().tolist() == [2.0, -2047.0]  # the second is no float16 number


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_integers_that_the_official_code_would_add_are_the_base_s(dtype: torch.dtype) -> None:
    base = BASE | {"ids": torch.tensor([1, 0]).to(dtype)}
    vectors = task_vectors(base, {"a": {"w": torch.ones(1), "ids": torch.tensor([0, 1]).to(dtype)}})
    assert add(vectors.base, task_arithmetic(vectors))["ids"].tolist() == base["ids"].tolist()


def test_tensors_that_only_experts_have_are_not_merged() -> None:
    assert list(task_arithmetic(task_vectors(BASE, {"a": EXPERTS["a"] | {"head": torch.ones(2)}}))) == ["w"]
