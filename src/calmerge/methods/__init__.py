"""The published methods, each one function of task vectors, and the table of their names."""

from collections.abc import Callable, Mapping
from typing import Any

from calmerge.methods.adamerging import adamerging, adamerging_pp
from calmerge.methods.average import average
from calmerge.methods.calm import calm
from calmerge.methods.dare import dare
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.methods.ties import ties, ties_split
from calmerge.pieces.drop import drop_and_rescale
from calmerge.pieces.trim import trim

METHODS: Mapping[str, Callable[..., Any]] = {
    "adamerging": adamerging,
    "adamerging_pp": adamerging_pp,
    "average": average,
    "calm": calm,
    "dare": dare,
    "drop_and_rescale": drop_and_rescale,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "ties_split": ties_split,
    "trim": trim,
}
"""What a recipe may call: methods, and the pieces that turn task vectors into task vectors."""

__all__ = ["METHODS", *METHODS]
