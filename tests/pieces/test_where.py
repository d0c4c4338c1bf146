"""A merge for each tensor, in Python and in recipes."""

from pathlib import Path

import pytest
import torch

from calmerge import UsageError, average, task_arithmetic, task_vectors
from calmerge.pieces.where import where
from calmerge.recipe import build, recipe_from_dict

BASE = {name: torch.zeros(1) for name in ("h.0.mlp", "h.1.mlp", "norm")}
TVS = task_vectors(BASE, {t: {n: torch.full((1,), x) for n in BASE} for t, x in (("a", 1.0), ("b", 3.0))})
HEAD = {"base": "./base", "experts": {"a": "./a", "b": "./b"}}


def values(merge: object) -> dict[str, float]:
    found = build(recipe_from_dict({**HEAD, "merge": merge}))(TVS, None, None)
    return {name: tensor.item() for name, tensor in found.items()}


def mistake(merge: object) -> str:
    with pytest.raises(UsageError) as e:
        recipe_from_dict({**HEAD, "merge": merge})
    return str(e.value)


def test_the_first_case_that_fits_counts() -> None:
    cases = [
        {"tensors": ["h.0.*"], "merge": "average"},
        {"tensors": ["*mlp"], "merge": {"task_arithmetic": {"scale": 1.0}}},
        {"merge": {"task_arithmetic": {"scale": 10.0}}},
    ]
    assert values({"where": cases}) == {"h.0.mlp": 2, "h.1.mlp": 4, "norm": 40}


def test_tensors_of_no_case_have_no_delta() -> None:
    assert list(where(TVS, cases=[(["norm"], average)])) == ["norm"]


def test_a_case_holds_a_pipe_and_follows_one() -> None:
    halved = {"drop_and_rescale": {"rate": 0.0}}
    assert values([halved, {"where": [{"merge": [halved, "average"]}]}])["norm"] == 2


def test_a_pattern_that_fits_nothing_is_a_slip() -> None:
    with pytest.raises(UsageError, match="fits no tensor"):
        where(TVS, cases=[(["h.2.*"], task_arithmetic)])


@pytest.mark.parametrize(
    ("merge", "says"),
    [
        ({"where": [{"merge": "average"}, {"tensors": ["x"], "merge": "average"}]}, "put it last"),
        ({"where": [{"tensors": ["x"]}]}, "where needs the key 'merge'"),
        ({"where": [{"tensors": ["x"], "merge": "averige"}]}, "no method is called 'averige'. Did you mean 'average'?"),
        ({"where": [{"tensor": ["x"], "merge": "average"}]}, "where has no key 'tensor'. Did you mean 'tensors'?"),
        ({"where": {}}, "where needs cases"),
        (["average", {"where": [{"merge": "average"}]}], "where takes task vectors, but average before it"),
    ],
)
def test_mistakes_in_cases(merge: object, says: str) -> None:
    assert says in mistake(merge)


def test_a_stack_and_a_merge_inside_are_read_with_their_mistakes(tmp_path: Path) -> None:
    def said(data: dict[str, object]) -> str:
        with pytest.raises(UsageError) as e:
            recipe_from_dict(data, folder=tmp_path)
        return str(e.value)

    assert "a recipe has 'stack' or 'base'" in said({"stack": ["./a"], "base": "./b"})
    assert "layers must be [first, end]" in said({"stack": [{"model": "./a", "layers": [2, 2]}]})
    assert "has no key 'layer'. Did you mean 'layers'?" in said({"stack": [{"model": "./a", "layer": [0, 2]}]})
    assert "a slice of a stack cannot have 'out'" in said({"stack": [{**HEAD, "merge": "average", "out": "x"}]})
    assert "a recipe has 'towers' or 'merge'; put 'merge' into a tower" in said({"towers": ["./a"], "merge": "average"})
    assert "'towers' is a list of inputs" in said({"towers": {"text": "./a"}})
    assert "'tensors' is a list of shell patterns" in said({"towers": [{"tensors": "text.*", "model": "./a"}]})
    assert "a tower without 'tensors' takes all that are left" in said({"towers": ["./a", "./b"]})
    assert "a tower cannot have 'out' of its own" in said({"towers": [{**HEAD, "merge": "average", "out": "x"}]})
    assert "has no key 'tensor'. Did you mean 'tensors'?" in said({"towers": [{"tensor": ["x"], "model": "./a"}]})
    inside = {"base": "./c", "experts": {"m": {**HEAD, "merge": "calm"}}, "merge": "average"}
    assert "calm learns from unlabelled data" in said(inside)
