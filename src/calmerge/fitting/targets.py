"""What the merged model should give: the outputs of each task's own expert on the task's pool, computed once."""

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors
from calmerge.fitting.samplers import Pool
from calmerge.tasks.base import Tasks


def expert_pools(tvs: TaskVectors, tasks: Tasks, *, run: Run | None = None) -> dict[str, Pool]:
    """By task, all examples of its pool with the logits of the task's own expert as targets.

    Raises:
        DataError: a task has no pool.
    """
    run = run or Run()
    pools = {}
    with run.progress.track("expert targets", len(tvs.tasks), "task") as bar:
        for task in tvs.tasks:
            logits = expert_logits(tvs, tasks, task, run)
            pools[task] = Pool(torch.arange(len(logits)), logits)
            bar.advance(1, task=task)
    return pools


def expert_logits(tvs: TaskVectors, tasks: Tasks, task: str, run: Run | None = None) -> Tensor:
    """What the task's own expert says of its pool: logits [n, classes]; kept in the state folder where there is one."""
    run = run or Run()
    file = run.folder / f"logits-{task}.safetensors" if run.folder else None
    pool = tasks.split(task, "pool")
    key = f"{tvs.experts[task].fingerprint} {len(pool)} {getattr(pool, 'fingerprint', '')}"
    if file and file.is_file():
        return _kept_logits(file, key)
    logits = tasks.logits(tvs.expert(task), task)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file({"logits": logits}, partial, metadata={"key": key})
        os.replace(partial, file)
    return logits


def _kept_logits(file: Path, key: str) -> Tensor:
    with safe_open(file, framework="pt") as f:
        if (f.metadata() or {}).get("key") != key:
            raise UsageError(f"{file.parent} holds the state of another run. Name another folder, or delete this one.")
        logits: Tensor = f.get_tensor("logits")
    return logits
