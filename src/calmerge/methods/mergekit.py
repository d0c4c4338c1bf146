"""mergekit's methods with mergekit's own rules, by the names that its YAML uses."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from calmerge.methods.arcee_fusion import arcee_fusion
from calmerge.methods.karcher import karcher
from calmerge.methods.mergekit_breadcrumbs import mergekit_breadcrumbs, mergekit_breadcrumbs_ties
from calmerge.methods.mergekit_dare import mergekit_dare_linear, mergekit_dare_ties
from calmerge.methods.mergekit_della import mergekit_della, mergekit_della_linear
from calmerge.methods.mergekit_linear import mergekit_linear, mergekit_task_arithmetic
from calmerge.methods.mergekit_model_stock import mergekit_model_stock
from calmerge.methods.mergekit_ram import mergekit_ram, mergekit_ramplus_tl
from calmerge.methods.mergekit_ties import mergekit_ties
from calmerge.methods.multislerp import multislerp
from calmerge.methods.nearswap import nearswap
from calmerge.methods.nuslerp import nuslerp
from calmerge.methods.passthrough import passthrough
from calmerge.methods.sce import mergekit_sce
from calmerge.methods.slerp import slerp

MERGEKIT_METHODS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "arcee_fusion": arcee_fusion,
        "breadcrumbs": mergekit_breadcrumbs,
        "breadcrumbs_ties": mergekit_breadcrumbs_ties,
        "dare_linear": mergekit_dare_linear,
        "dare_ties": mergekit_dare_ties,
        "della": mergekit_della,
        "della_linear": mergekit_della_linear,
        "karcher": karcher,
        "linear": mergekit_linear,
        "model_stock": mergekit_model_stock,
        "multislerp": multislerp,
        "nearswap": nearswap,
        "nuslerp": nuslerp,
        "passthrough": passthrough,
        "ram": mergekit_ram,
        "ramplus_tl": mergekit_ramplus_tl,
        "sce": mergekit_sce,
        "slerp": slerp,
        "task_arithmetic": mergekit_task_arithmetic,
        "ties": mergekit_ties,
    }
)
"""Functions of task vectors and of mergekit's parameters, under mergekit's names for these.

An option whose annotation is a `Sequence` holds one number for each model in the order of the tasks, or a single one
for all; the others are numbers of the whole merge. mergekit's `lambda` is called `lambda_` here, as Python keeps that
word for itself; `int8_mask` is left out, as it changes no result; `of`, `seed` and the `weight` of `karcher` are ours.
An option without a default must be given.

Methods that know no base in mergekit (`linear`, `slerp`, `karcher`, `passthrough`, and `nuslerp` and `multislerp` where
no base is named) work on weights: give them task vectors over a base of zeros, with every model among the tasks.
`slerp` takes the two models in order, that of t = 0 (the base) first; `nearswap` and `arcee_fusion` take the one model
that is not the base.
"""
