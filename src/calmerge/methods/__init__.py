"""The published methods, each one function of task vectors in a file of its own, and the table of their names."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

_HOME = {
    "adamerging": "methods.adamerging",
    "adamerging_pp": "methods.adamerging",
    "average": "methods.average",
    "calm": "methods.calm",
    "consensus": "methods.tall_masks",
    "core_space": "methods.core_space",
    "cart": "methods.cart",
    "dare": "methods.dare",
    "distillation": "methods.distillation",
    "doge": "methods.doge",
    "doge_vectors": "methods.doge",
    "drop_and_rescale": "pieces.drop",
    "frank_wolfe": "methods.frank_wolfe",
    "frank_wolfe_soft": "methods.frank_wolfe",
    "emr": "methods.emr",
    "iso_c": "methods.iso_c",
    "lines": "methods.lines",
    "localize_and_stitch": "methods.localize_and_stitch",
    "localize_and_stitch_dataless": "methods.localize_and_stitch",
    "iso_cts": "methods.iso_cts",
    "mergekit_linear": "methods.mergekit_linear",
    "mergekit_task_arithmetic": "methods.mergekit_linear",
    "mergekit_ties": "methods.mergekit_ties",
    "model_stock": "methods.model_stock",
    "slerp": "methods.slerp",
    "tall_masks": "methods.tall_masks",
    "localize_and_stitch": "methods.localize_and_stitch",
    "localize_and_stitch_dataless": "methods.localize_and_stitch",
    "peft": "methods.peft",
    "task_arithmetic": "methods.task_arithmetic",
    "ties": "methods.ties",
    "ties_split": "methods.ties",
    "trim": "pieces.trim",
    "tsv_m": "methods.tsv_m",
    "wudi": "methods.wudi",
}


class _Methods(Mapping[str, Callable[..., Any]]):
    """Functions by name; a file is imported when one of its functions is first asked for."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        fn: Callable[..., Any] = getattr(import_module(f"calmerge.{_HOME[name]}"), name)
        return fn

    def __contains__(self, name: object) -> bool:
        return name in _HOME

    def __iter__(self) -> Iterator[str]:
        return iter(_HOME)

    def __len__(self) -> int:
        return len(_HOME)


METHODS: Mapping[str, Callable[..., Any]] = _Methods()
"""What a recipe may call: methods, and the pieces that turn task vectors into task vectors."""

__all__ = ["METHODS"]
