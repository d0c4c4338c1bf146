"""The published methods, each one function of task vectors in a file of its own, and the table of their names."""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

_HOME = {
    "adamerging": "methods.adamerging",
    "adamerging_pp": "methods.adamerging",
    "adarank": "methods.adarank",
    "arcee_fusion": "methods.arcee_fusion",
    "average": "methods.average",
    "breadcrumbs": "methods.breadcrumbs",
    "calm": "methods.calm",
    "calm_joint": "methods.calm_joint",
    "cart": "methods.cart",
    "concrete_adamerging": "methods.concrete",
    "concrete_task_arithmetic": "methods.concrete",
    "consensus": "methods.tall_masks",
    "core_space": "methods.core_space",
    "dam": "methods.dam",
    "dare": "methods.dare",
    "dare_ties": "methods.dare",
    "dc_merge": "methods.dc_merge",
    "della": "methods.della",
    "della_linear": "methods.della",
    "distillation": "methods.distillation",
    "doge": "methods.doge",
    "doge_vectors": "methods.doge",
    "drop_and_rescale": "pieces.drop",
    "emr": "methods.emr",
    "equal_norms": "pieces.equal_norms",
    "fisher": "methods.fisher",
    "frank_wolfe": "methods.frank_wolfe",
    "frank_wolfe_soft": "methods.frank_wolfe",
    "iso_c": "methods.iso_c",
    "iso_cts": "methods.iso_cts",
    "karcher": "methods.karcher",
    "knots": "methods.knots",
    "lines": "methods.lines",
    "localize_and_stitch": "methods.localize_and_stitch",
    "localize_and_stitch_dataless": "methods.localize_and_stitch",
    "magmax": "methods.magmax",
    "magprune": "pieces.magprune",
    "map_front": "methods.map_front",
    "map_nested": "methods.map_nested",
    "medsamix": "methods.medsamix",
    "mergekit_breadcrumbs": "methods.mergekit_breadcrumbs",
    "mergekit_breadcrumbs_ties": "methods.mergekit_breadcrumbs",
    "mergekit_dare_linear": "methods.mergekit_dare",
    "mergekit_dare_ties": "methods.mergekit_dare",
    "mergekit_della": "methods.mergekit_della",
    "mergekit_della_linear": "methods.mergekit_della",
    "mergekit_linear": "methods.mergekit_linear",
    "mergekit_model_stock": "methods.mergekit_model_stock",
    "mergekit_ram": "methods.mergekit_ram",
    "mergekit_ramplus_tl": "methods.mergekit_ram",
    "mergekit_sce": "methods.sce",
    "mergekit_task_arithmetic": "methods.mergekit_linear",
    "mergekit_ties": "methods.mergekit_ties",
    "middle": "pieces.middle",
    "model_stock": "methods.model_stock",
    "multislerp": "methods.multislerp",
    "nearswap": "methods.nearswap",
    "negate": "pieces.weigh",
    "nuslerp": "methods.nuslerp",
    "only": "pieces.only",
    "passthrough": "methods.passthrough",
    "pcb": "methods.pcb",
    "peft": "methods.peft",
    "prodistill": "methods.prodistill",
    "ram": "methods.ram",
    "ram_plus": "methods.ram",
    "realign_heads": "methods.surgery",
    "regmean": "methods.regmean",
    "regmean_pp": "methods.regmean",
    "sce": "methods.sce",
    "searched": "methods.searched",
    "self_positioning": "methods.self_positioning",
    "slerp": "methods.slerp",
    "smile": "methods.smile",
    "surgery": "methods.surgery",
    "svc": "methods.svc",
    "tall_masks": "methods.tall_masks",
    "task_arithmetic": "methods.task_arithmetic",
    "ties": "methods.ties",
    "ties_split": "methods.ties",
    "trim": "pieces.trim",
    "truncate": "pieces.truncate",
    "tsv_c": "methods.tsv_c",
    "tsv_m": "methods.tsv_m",
    "twin_merging": "methods.twin",
    "twin_merging_routed": "methods.twin",
    "weigh": "pieces.weigh",
    "weighted_average": "methods.weighted_average",
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
