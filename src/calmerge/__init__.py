"""calmerge: one multi-task model out of many fine-tuned checkpoints, without retraining and without labels.

Names are loaded when they are first used, so that importing the package (and `calmerge --help`) is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calmerge._checkpoint import open_checkpoint as open_checkpoint
    from calmerge._errors import CalmergeError as CalmergeError
    from calmerge._errors import CheckpointError as CheckpointError
    from calmerge._errors import DataError as DataError
    from calmerge._errors import FitError as FitError
    from calmerge._errors import MissingExtra as MissingExtra
    from calmerge._errors import OutputError as OutputError
    from calmerge._errors import UsageError as UsageError
    from calmerge._lora import Adapter as Adapter
    from calmerge._lora import adapted as adapted
    from calmerge._merge import merge as merge
    from calmerge._merged import Merged as Merged
    from calmerge._merged import open_merged as open_merged
    from calmerge._run import Run as Run
    from calmerge._save import export as export
    from calmerge._save import save as save
    from calmerge._save_adapter import extract_lora as extract_lora
    from calmerge._save_adapter import save_adapter as save_adapter
    from calmerge._task_vectors import Merge as Merge
    from calmerge._task_vectors import TaskVectors as TaskVectors
    from calmerge._task_vectors import materialise as materialise
    from calmerge._task_vectors import task_vectors as task_vectors
    from calmerge._weights import StateDict as StateDict
    from calmerge._weights import Weights as Weights
    from calmerge._weights import add as add
    from calmerge.methods.adamerging import adamerging as adamerging
    from calmerge.methods.adamerging import adamerging_pp as adamerging_pp
    from calmerge.methods.adarank import adarank as adarank
    from calmerge.methods.arcee_fusion import arcee_fusion as arcee_fusion
    from calmerge.methods.average import average as average
    from calmerge.methods.breadcrumbs import breadcrumbs as breadcrumbs
    from calmerge.methods.calm import calm as calm
    from calmerge.methods.calm_joint import calm_joint as calm_joint
    from calmerge.methods.cart import cart as cart
    from calmerge.methods.concrete import concrete_adamerging as concrete_adamerging
    from calmerge.methods.concrete import concrete_task_arithmetic as concrete_task_arithmetic
    from calmerge.methods.core_space import core_space as core_space
    from calmerge.methods.dam import attack_success_rate as attack_success_rate
    from calmerge.methods.dam import dam as dam
    from calmerge.methods.dare import dare as dare
    from calmerge.methods.dare import dare_ties as dare_ties
    from calmerge.methods.dc_merge import dc_merge as dc_merge
    from calmerge.methods.della import della as della
    from calmerge.methods.della import della_linear as della_linear
    from calmerge.methods.distillation import distillation as distillation
    from calmerge.methods.doge import doge as doge
    from calmerge.methods.doge import doge_vectors as doge_vectors
    from calmerge.methods.emr import emr as emr
    from calmerge.methods.fisher import fisher as fisher
    from calmerge.methods.frank_wolfe import frank_wolfe as frank_wolfe
    from calmerge.methods.frank_wolfe import frank_wolfe_soft as frank_wolfe_soft
    from calmerge.methods.iso_c import iso_c as iso_c
    from calmerge.methods.iso_cts import iso_cts as iso_cts
    from calmerge.methods.karcher import karcher as karcher
    from calmerge.methods.knots import knots as knots
    from calmerge.methods.lines import lines as lines
    from calmerge.methods.localize_and_stitch import localize_and_stitch as localize_and_stitch
    from calmerge.methods.localize_and_stitch import localize_and_stitch_dataless as localize_and_stitch_dataless
    from calmerge.methods.magmax import magmax as magmax
    from calmerge.methods.map_front import map_front as map_front
    from calmerge.methods.map_nested import map_nested as map_nested
    from calmerge.methods.medsamix import medsamix as medsamix
    from calmerge.methods.model_stock import model_stock as model_stock
    from calmerge.methods.multislerp import multislerp as multislerp
    from calmerge.methods.nearswap import nearswap as nearswap
    from calmerge.methods.nuslerp import nuslerp as nuslerp
    from calmerge.methods.passthrough import passthrough as passthrough
    from calmerge.methods.pcb import pcb as pcb
    from calmerge.methods.peft import peft as peft
    from calmerge.methods.prodistill import prodistill as prodistill
    from calmerge.methods.ram import ram as ram
    from calmerge.methods.ram import ram_plus as ram_plus
    from calmerge.methods.regmean import regmean as regmean
    from calmerge.methods.regmean import regmean_pp as regmean_pp
    from calmerge.methods.sce import sce as sce
    from calmerge.methods.searched import searched as searched
    from calmerge.methods.self_positioning import self_positioning as self_positioning
    from calmerge.methods.slerp import slerp as slerp
    from calmerge.methods.smile import smile as smile
    from calmerge.methods.surgery import realign_heads as realign_heads
    from calmerge.methods.surgery import surgery as surgery
    from calmerge.methods.svc import svc as svc
    from calmerge.methods.tall_masks import consensus as consensus
    from calmerge.methods.tall_masks import tall_masks as tall_masks
    from calmerge.methods.task_arithmetic import task_arithmetic as task_arithmetic
    from calmerge.methods.ties import ties as ties
    from calmerge.methods.tsv_c import tsv_c as tsv_c
    from calmerge.methods.tsv_m import tsv_m as tsv_m
    from calmerge.methods.twin import twin_merging as twin_merging
    from calmerge.methods.twin import twin_merging_routed as twin_merging_routed
    from calmerge.methods.weighted_average import weighted_average as weighted_average
    from calmerge.methods.wudi import wudi as wudi
    from calmerge.pieces.equal_norms import equal_norms as equal_norms
    from calmerge.pieces.mask import load_masks as load_masks
    from calmerge.pieces.only import only as only
    from calmerge.pieces.truncate import truncate as truncate
    from calmerge.suites.suite import load_suite as load_suite
    from calmerge.tasks.base import Task as Task
    from calmerge.tasks.base import Tasks as Tasks
    from calmerge.tasks.hf import HuggingFaceModel as HuggingFaceModel
    from calmerge.tasks.hf import open_suite as open_suite
    from calmerge.tasks.module import ModuleModel as ModuleModel


_HOME = {
    "Adapter": "_lora",
    "CalmergeError": "_errors",
    "CheckpointError": "_errors",
    "DataError": "_errors",
    "FitError": "_errors",
    "HuggingFaceModel": "tasks.hf",
    "Merge": "_task_vectors",
    "Merged": "_merged",
    "MissingExtra": "_errors",
    "ModuleModel": "tasks.module",
    "OutputError": "_errors",
    "Run": "_run",
    "StateDict": "_weights",
    "Task": "tasks.base",
    "TaskVectors": "_task_vectors",
    "Tasks": "tasks.base",
    "UsageError": "_errors",
    "Weights": "_weights",
    "adamerging": "methods.adamerging",
    "adamerging_pp": "methods.adamerging",
    "adapted": "_lora",
    "adarank": "methods.adarank",
    "add": "_weights",
    "arcee_fusion": "methods.arcee_fusion",
    "attack_success_rate": "methods.dam",
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
    "emr": "methods.emr",
    "equal_norms": "pieces.equal_norms",
    "export": "_save",
    "extract_lora": "_save_adapter",
    "fisher": "methods.fisher",
    "frank_wolfe": "methods.frank_wolfe",
    "frank_wolfe_soft": "methods.frank_wolfe",
    "iso_c": "methods.iso_c",
    "iso_cts": "methods.iso_cts",
    "karcher": "methods.karcher",
    "knots": "methods.knots",
    "lines": "methods.lines",
    "load_masks": "pieces.mask",
    "load_suite": "suites.suite",
    "localize_and_stitch": "methods.localize_and_stitch",
    "localize_and_stitch_dataless": "methods.localize_and_stitch",
    "magmax": "methods.magmax",
    "materialise": "_task_vectors",
    "merge": "_merge",
    "map_front": "methods.map_front",
    "map_nested": "methods.map_nested",
    "medsamix": "methods.medsamix",
    "model_stock": "methods.model_stock",
    "multislerp": "methods.multislerp",
    "nearswap": "methods.nearswap",
    "nuslerp": "methods.nuslerp",
    "only": "pieces.only",
    "open_checkpoint": "_checkpoint",
    "open_merged": "_merged",
    "open_suite": "tasks.hf",
    "passthrough": "methods.passthrough",
    "pcb": "methods.pcb",
    "peft": "methods.peft",
    "prodistill": "methods.prodistill",
    "ram": "methods.ram",
    "ram_plus": "methods.ram",
    "realign_heads": "methods.surgery",
    "regmean": "methods.regmean",
    "regmean_pp": "methods.regmean",
    "save": "_save",
    "save_adapter": "_save_adapter",
    "sce": "methods.sce",
    "searched": "methods.searched",
    "self_positioning": "methods.self_positioning",
    "slerp": "methods.slerp",
    "smile": "methods.smile",
    "surgery": "methods.surgery",
    "svc": "methods.svc",
    "tall_masks": "methods.tall_masks",
    "task_arithmetic": "methods.task_arithmetic",
    "task_vectors": "_task_vectors",
    "ties": "methods.ties",
    "truncate": "pieces.truncate",
    "tsv_c": "methods.tsv_c",
    "tsv_m": "methods.tsv_m",
    "twin_merging": "methods.twin",
    "twin_merging_routed": "methods.twin",
    "weighted_average": "methods.weighted_average",
    "wudi": "methods.wudi",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'calmerge' has no attribute '{name}'")
    value = getattr(import_module(f"calmerge.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
