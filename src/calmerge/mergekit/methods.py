"""What mergekit's methods want of a file: a base or none, how many models, which parameters for each model."""

import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from calmerge._hints import alternatives, fault_of
from calmerge._signature import Option, options_of
from calmerge.methods.mergekit import MERGEKIT_METHODS

Role = Literal["model", "base", "either", "first"]
"""What `base_model` is: one more of the models; what the others are compared with; that where it is given, nothing
otherwise; or the first of the models."""

_ROLES: dict[str, Role] = {
    "karcher": "model", "linear": "model", "passthrough": "model",
    "multislerp": "either", "nuslerp": "either",
    "slerp": "first",
}  # fmt: skip
_COUNTS = {"slerp": (2, 2), "nuslerp": (2, 2), "passthrough": (1, 1), "nearswap": (1, 1), "arcee_fusion": (1, 1)}
_NOT_MERGEKITS = ("of", "seed", "weight")
WITHOUT_EFFECT = ("int8_mask", "normalize")
"""Parameters that stand in files of methods which do not know them; they are read over, with a remark."""


def role_of(method: str) -> Role:
    """What `base_model` is to a method."""
    return _ROLES.get(method, "base")


def count_of(method: str) -> tuple[int, float]:
    """The least and the most models a method takes, without a base that it compares them with."""
    return _COUNTS.get(method, (1, float("inf")))


def parameters_of(method: str) -> dict[str, Option]:
    """A method's parameters under mergekit's names.

    >>> list(parameters_of("ties"))
    ['weight', 'density', 'normalize', 'rescale', 'lambda']
    """
    own = {"karcher": ("weight", *_NOT_MERGEKITS)}.get(method, ("of", "seed"))
    return {name.rstrip("_"): o for name, o in options_of(MERGEKIT_METHODS[method]).items() if name not in own}


def per_model(option: Option) -> bool:
    """Whether a parameter has a value for each model."""
    return any(_sequence(hint) for hint in alternatives(option.hint))


def default_of(option: Option) -> Any:
    """The value for a model that a file gives none."""
    default = option.default
    return default[0] if isinstance(default, Sequence) and not isinstance(default, str) else default


def fault_in(value: Any, option: Option) -> str | None:
    """What is wrong with one value of a parameter; "must ..., got ..."."""
    hints = [h for hint in alternatives(option.hint) for h in (get_args(hint) if _sequence(hint) else (hint,))]
    return fault_of(value, typing.Union[tuple(hints)])  # noqa: UP007 (made at run time)


def _sequence(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Sequence) and not issubclass(origin, str)
