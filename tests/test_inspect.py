"""Statistics of task vectors: numbers that can be checked by hand."""

import json
import math

import pytest
import torch

from calmerge import CheckpointError, task_vectors
from calmerge.inspect import inspect_task_vectors


def of(base: list[float], **experts: list[float]):
    return inspect_task_vectors(
        task_vectors(
            {"w": torch.tensor(base)}, {t: {"w": torch.tensor(b) + torch.tensor(base)} for t, b in experts.items()}
        )
    )


def test_norms_and_cosines() -> None:
    found = of([10.0, 0.0], a=[3.0, 4.0], b=[4.0, -3.0], c=[-3.0, -4.0])
    assert found.norms == {"a": 5.0, "b": 5.0, "c": 5.0}
    assert (found.base_norm, found.relative["a"], found.entries) == (10.0, 0.5, 2)
    assert found.cosines == [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    assert found.base_cosines["a"] == pytest.approx(13 / math.hypot(13, 4))


def test_sign_conflicts_count_entries_where_neither_is_zero() -> None:
    found = of([9.0] * 4, a=[1.0, 1.0, 1.0, 0.0], b=[1.0, -1.0, 0.0, 1.0])
    assert found.sign_conflicts == [[0.0, 0.5], [0.5, 0.0]]
    assert found.zeros == {"a": 0.25, "b": 0.25}


def test_numbers_do_not_depend_on_how_tensors_are_cut() -> None:
    g = torch.Generator().manual_seed(0)
    base, tau = torch.randn(700, 900, generator=g), torch.randn(2, 700, 900, generator=g)
    whole = inspect_task_vectors(task_vectors({"w": base}, {"a": {"w": base + tau[0]}, "b": {"w": base + tau[1]}}))
    exact = (torch.stack([(base + tau[0]) - base, (base + tau[1]) - base])).double().flatten(1)
    assert whole.norms["a"] == pytest.approx(exact[0].norm().item(), rel=1e-12)
    assert whole.cosines[0][1] == pytest.approx(torch.cosine_similarity(exact[0], exact[1], 0).item(), abs=1e-12)


def test_tensors_that_did_not_move() -> None:
    base = {"frozen": torch.ones(2), "half": torch.ones(2), "moved": torch.ones(2)}
    experts = {
        "a": {"frozen": torch.ones(2), "half": torch.ones(2), "moved": torch.zeros(2)},
        "b": {"frozen": torch.ones(2), "half": torch.zeros(2), "moved": torch.zeros(2)},
    }
    found = inspect_task_vectors(task_vectors(base, experts))
    assert found.untouched == ("frozen",)
    assert found.frozen == {"a": ("half",)}
    assert found.tensor_norms["half"] == [0.0, pytest.approx(math.sqrt(2))]


def test_heads_and_skipped_tensors_are_listed() -> None:
    base = {"w": torch.ones(2), "steps": torch.tensor(3), "top": torch.ones(4, 2)}
    expert = {"w": torch.zeros(2), "steps": torch.tensor(4), "top": torch.ones(7, 2), "bias": torch.ones(7)}
    found = inspect_task_vectors(task_vectors(base, {"a": expert}))
    assert found.heads == {"a": {"top": (7, 2), "bias": (7,)}}
    assert found.skipped == {"steps": "integer tensor", "top": "head, kept per task"}


def test_another_base_is_noticed() -> None:
    assert of([1.0, 1.0], a=[0.1, 0.0]).warnings == ()
    (warning,) = of([1.0, 1.0], a=[-2.0, 0.0]).warnings
    assert "expert 'a' is far from the base" in warning
    assert "1.41 times the base's length" in warning
    assert "cosine of 0.00" in warning


def test_copies_are_noticed() -> None:
    found = of([10.0, 10.0], a=[1.0, 0.0], b=[1.0, 0.0], c=[0.0, 0.0])
    assert found.warnings == (
        "experts 'a' and 'b' differ from the base in the same way. Is one a copy?",
        "expert 'c' is the base itself: its task vector is 0.",
    )
    assert found.cosines[2] == [0.0, 0.0, 0.0]


def test_a_base_of_zeros_gives_numbers() -> None:
    found = of([0.0, 0.0], a=[1.0, 0.0])
    assert (found.relative["a"], found.base_cosines["a"]) == (0.0, 0.0)


def test_not_a_number_is_refused() -> None:
    with pytest.raises(CheckpointError, match="NaN"):
        of([1.0], a=[math.nan])


def test_it_goes_into_json_and_into_a_report() -> None:
    found = of([10.0, 0.0], a=[3.0, 4.0], b=[4.0, -3.0])
    assert json.loads(json.dumps(found.to_dict()))["norms"] == {"a": 5.0, "b": 5.0}
    assert found.analysis().cosines == [[1.0, 0.0], [0.0, 1.0]]
