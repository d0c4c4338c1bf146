"""calmerge: one multi-task model out of many fine-tuned checkpoints, without retraining and without labels."""

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import (
    CalmergeError,
    CheckpointError,
    DataError,
    FitError,
    MissingExtra,
    OutputError,
    UsageError,
)
from calmerge._run import Run
from calmerge._save import export, save
from calmerge._task_vectors import Merge, TaskVectors, task_vectors
from calmerge._weights import StateDict, Weights, add

__all__ = [
    "CalmergeError",
    "CheckpointError",
    "DataError",
    "FitError",
    "Merge",
    "MissingExtra",
    "OutputError",
    "Run",
    "StateDict",
    "TaskVectors",
    "UsageError",
    "Weights",
    "add",
    "export",
    "open_checkpoint",
    "save",
    "task_vectors",
]
