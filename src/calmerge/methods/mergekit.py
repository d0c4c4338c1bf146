"""mergekit's methods with mergekit's own rules, by the names that its YAML uses."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from calmerge.methods.mergekit_linear import mergekit_linear, mergekit_task_arithmetic
from calmerge.methods.mergekit_ties import mergekit_ties
from calmerge.methods.slerp import slerp

MERGEKIT_METHODS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "linear": mergekit_linear,
        "slerp": slerp,
        "task_arithmetic": mergekit_task_arithmetic,
        "ties": mergekit_ties,
    }
)
"""Functions of task vectors and of mergekit's parameters, under mergekit's names for these.

An option whose annotation is a `Sequence` holds one number for each model in the order of the tasks, or a single one
for all; the others are numbers of the whole merge. mergekit's `lambda` is called `lambda_` here, as Python keeps that
word for itself, and `int8_mask` is left out, as it changes no result. An option without a default must be given.

Methods that know no base in mergekit (`linear`, `slerp`, `karcher`, `passthrough`) work on weights: give them task
vectors over a base of zeros, or over any other model. `slerp` takes the two models in order, that of t = 0 first;
`nearswap` and `arcee_fusion` take the one model that is not the base.
"""
