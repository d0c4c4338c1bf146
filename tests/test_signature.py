"""Options checked against signatures: one test per message."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from calmerge import Merge, UsageError
from calmerge._signature import (
    Count,
    DropRate,
    Fraction,
    Interval,
    KeepFraction,
    Positive,
    check,
    checked_call,
    options_of,
    raise_together,
)


def method(
    tvs: list[int],
    *,
    need: float,
    keep: KeepFraction = 0.2,
    rate: DropRate = 0.9,
    share: Fraction = 0.5,
    scale: float = 1.0,
    steps: Count = 100,
    combine: Literal["mean", "sum", "max"] = "mean",
    lr: Positive | Literal["auto"] = "auto",
    clamp: bool = True,
    groups: Sequence[Sequence[str]] | None = None,
    weights: Mapping[str, float] | None = None,
    inner: Merge | None = None,
    order: Callable[[int], str] | None = None,
    masks: Path | None = None,
    size: Annotated[int, Interval(2, 8)] = 4,
    tasks: Any = None,
) -> float:
    return need * sum(tvs)


def problem(**options: Any) -> str:
    problems = check(method, {"need": 1.0, **options}, "r.yaml:9", name="ties", provided=["tasks"])
    assert len(problems) <= 1
    return problems[0] if problems else ""


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1},
        {"keep": 1e-9},
        {"rate": 0},
        {"share": 0},
        {"scale": -3},
        {"lr": "auto"},
        {"lr": 1e7},
        {"groups": [["a"], ["b", "c"]]},
        {"groups": None},
        {"weights": {"a": 1}},
        {"inner": len},
        {"masks": "masks/"},
        {"size": 2},
    ],
)
def test_what_fits(options: dict[str, Any]) -> None:
    assert problem(**options) == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keep": 20}, "ties.keep must lie in (0, 1], got 20. For 20 % write 0.2."),
        ({"keep": 0}, "ties.keep must lie in (0, 1], got 0."),
        ({"keep": 200}, "ties.keep must lie in (0, 1], got 200."),
        ({"keep": "20%"}, "ties.keep must be a number, got '20%'. For 20 % write 0.2."),
        ({"keep": "0.2"}, "ties.keep must be a number, got '0.2'. Write it without quotes."),
        ({"keep": True}, "ties.keep must be a number, got True."),
        ({"keep": None}, "ties.keep must be a number, got None."),
        ({"keep": math.nan}, "ties.keep must be a finite number, got nan."),
        ({"rate": 1}, "ties.rate must lie in [0, 1), got 1."),
        ({"rate": 90}, "ties.rate must lie in [0, 1), got 90. For 90 % write 0.9."),
        ({"share": -0.1}, "ties.share must lie in [0, 1], got -0.1."),
        ({"scale": math.inf}, "ties.scale must be a finite number, got inf."),
        ({"steps": 0}, "ties.steps must be at least 1, got 0."),
        ({"steps": 1.5}, "ties.steps must be a whole number, got 1.5."),
        ({"size": 9}, "ties.size must lie in [2, 8], got 9."),
        ({"combine": "men"}, "ties.combine must be 'mean' or 'sum' or 'max', got 'men'. Did you mean 'mean'?"),
        ({"combine": 3}, "ties.combine must be 'mean' or 'sum' or 'max', got 3."),
        ({"lr": 0}, "ties.lr must be greater than 0, got 0."),
        ({"lr": "atuo"}, "ties.lr must be a number or 'auto', got 'atuo'. Did you mean 'auto'?"),
        ({"clamp": "yes"}, "ties.clamp must be true or false, got 'yes'."),
        ({"groups": "a"}, "ties.groups must be a list of list of text or null, got 'a'."),
        ({"groups": ["a"]}, "ties.groups must be a list of list of text; entry 1 must be a list of text, got 'a'."),
        ({"weights": {"a": "x"}}, "ties.weights must hold for 'a' a value that must be a number, got 'x'."),
        ({"inner": 3}, "ties.inner must be a method or null, got 3."),
        ({"order": "a"}, "ties.order must be a function (in Python only) or null, got 'a'."),
        ({"kep": 0.2}, "ties has no option 'kep'. Did you mean 'keep'?"),
        ({"tasks": 1}, "ties.tasks cannot be set here: calmerge fills it in."),
        ({"tvs": 1}, "ties has no option 'tvs'."),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], says: str) -> None:
    assert problem(**options).startswith(f"r.yaml:9: {says}")


def test_a_required_option_that_is_missing() -> None:
    assert check(method, {}, "r.yaml:9") == ["r.yaml:9: method needs the option 'need' (number)."]


def test_every_mistake_is_reported_at_its_own_line() -> None:
    lines = {"": "r.yaml:8", "keep": "r.yaml:9", "kep": "r.yaml:10"}
    assert check(method, {"keep": 20, "kep": 1}, lines) == [
        "r.yaml:9: method.keep must lie in (0, 1], got 20. For 20 % write 0.2.",
        "r.yaml:10: method has no option 'kep'. Did you mean 'keep'?",
        "r.yaml:8: method needs the option 'need' (number).",
    ]


def test_a_function_without_options_says_so() -> None:
    assert check(lambda tvs: tvs, {"scale": 1}, name="average") == ["average has no option 'scale'. It takes none."]


def test_a_partial_is_checked_as_its_function() -> None:
    half = functools.partial(method, need=1.0)
    assert check(half, {"keep": 20}) == ["method.keep must lie in (0, 1], got 20. For 20 % write 0.2."]


def test_checked_call_runs_or_raises_everything() -> None:
    assert checked_call(method, [1, 2], need=2.0) == 6.0
    with pytest.raises(UsageError) as e:
        checked_call(method, [1, 2], need="x", keep=20)
    assert str(e.value).splitlines() == [
        "2 mistakes:",
        "  method.need must be a number, got 'x'.",
        "  method.keep must lie in (0, 1], got 20. For 20 % write 0.2.",
    ]


def test_no_problem_raises_nothing() -> None:
    raise_together([])


def test_options_describe_themselves() -> None:
    described = {o.name: (o.type, o.range, o.required) for o in options_of(method, ["tasks"]).values()}
    assert described["need"] == ("number", "", True)
    assert described["keep"] == ("number", "(0, 1]", False)
    assert described["steps"] == ("whole number", "[1, inf)", False)
    assert described["lr"] == ("number | 'auto'", "(0, inf)", False)
    assert described["groups"] == ("list of list of text | null", "", False)
    assert described["inner"] == ("method | null", "", False)
    assert "tasks" not in described
    assert [o.name for o in options_of(method).values() if o.takes_merge] == ["inner"]
    assert [o.name for o in options_of(method).values() if o.takes_path] == ["masks"]
