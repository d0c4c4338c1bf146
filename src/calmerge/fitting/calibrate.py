"""Statistics of the experts on their own inputs, computed once by forward passes and written as files.

What a statistic is made of never meets in memory: one expert is run at a time, and a merge reads the files block by
block like any checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import DataError
from calmerge._random import permutation, uniform
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors
from calmerge._weights import ALL, Memo, Node, Weights
from calmerge.tasks.base import Tasks
from calmerge.tasks.taps import linear_layers, open_model, tapped, tokens


class Statistics(Weights):
    """One file of statistics a task, under the names of the merged tensors: `read(name)` is [T, ...] in float32."""

    row_dim = 1

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.tasks = tuple(files)
        self._parts = [open_checkpoint(file) for file in files.values()]
        self.inputs: tuple[Node, ...] = tuple(self._parts)
        self.specs = self._parts[0].specs

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The statistics of one tensor, all tasks."""
        return torch.stack([part.read(name, rows).float() for part in self._parts])


def chosen(tasks: Tasks, task: str, examples: int, seed: object) -> Tensor:
    """Up to so many examples of a task's pool, in the pool's order."""
    n = len(tasks.split(task, "pool"))
    return permutation(n, seed, task, "calibrate")[:examples].sort().values


def fisher_diagonals(
    tvs: TaskVectors,
    tasks: Tasks,
    folder: Path,
    *,
    examples: int,
    batched: bool,
    batch: int,
    seed: int,
    run: Run,
) -> Statistics:
    """The diagonal of each expert's Fisher information on its own inputs.

    F[i] = mean over x of E_{y ~ p(y | x)} (d log p(y | x) / d theta_i)^2, the expectation over all classes of up to
    32, with one drawn class where there are more. Batched, as FusionBench: per batch the squared gradient of
    sum_x sum_c sqrt(p_c) log p_c, p fixed, summed over batches and divided by the number of examples.

    Args:
        tvs: the experts.
        tasks: the model and its pools.
        folder: where the files go.
        examples: of each task's pool.
        batched: the cheap estimator, which adds cross terms between examples and classes.
        batch: examples in a batch of the cheap estimator.
        seed: decides which examples, and which classes where these are drawn.
        run: progress.
    """

    def of(task: str) -> dict[str, Tensor]:
        theta = {n: tvs.base.read(n).float() + tau for n, tau in tvs.of(task).items()}
        for w in theta.values():
            w.requires_grad_()
        square = {n: torch.zeros_like(w) for n, w in theta.items()}
        indices = chosen(tasks, task, examples, seed)
        for part in torch.split(indices, batch if batched else 1):
            inputs, _ = tasks.split(task, "pool").batch(part)
            log_p = tasks.forward(theta, inputs, task).log_softmax(1)
            for term in _terms(log_p, batched, f"{seed} {task} {int(part[0])}"):
                grads = torch.autograd.grad(term, list(theta.values()), retain_graph=True, allow_unused=True)
                for (name, total), g in zip(square.items(), grads, strict=True):
                    square[name] = total if g is None else total.addcmul_(g, g)
        return {n: s / len(indices) for n, s in square.items()}

    return _each("Fisher information", tvs, of, folder, run)


def grams(tvs: TaskVectors, tasks: Tasks, folder: Path, *, examples: int, seed: int, run: Run) -> Statistics:
    """By linear layer, the mean of x x^T over the tokens that it is given, in the expert's own forward passes.

    Padding is left out; a layer that runs several times has all its inputs counted.

    Args:
        tvs: the experts.
        tasks: the model and its pools.
        folder: where the files go.
        examples: of each task's pool.
        seed: decides which.
        run: progress.

    Raises:
        DataError: the model does not show its module, or has no linear layer among the merged tensors.
    """

    def of(task: str) -> dict[str, Tensor]:
        theta = {n: tvs.base.read(n).float() + tau for n, tau in tvs.of(task).items()}
        return gram_of(tvs, tasks, task, theta, list(tvs), examples=examples, seed=seed)

    return _each("Gram matrices", tvs, of, folder, run)


def gram_of(
    tvs: TaskVectors,
    tasks: Tasks,
    task: str,
    theta: Mapping[str, Tensor],
    names: list[str],
    *,
    examples: int,
    seed: int,
) -> dict[str, Tensor]:
    """The mean of x x^T over tokens for the linear layers among `names`, at given weights."""
    model = open_model(tasks, "Gram matrices are taken at its linear layers")
    layers = linear_layers(model, dict.fromkeys(names))
    if not layers:
        raise DataError("none of the merged tensors is the weight of a linear layer, so there is no Gram matrix.")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    indices = chosen(tasks, task, examples, seed)
    with torch.no_grad():
        for part in torch.split(indices, tasks.batch):
            inputs, _ = tasks.split(task, "pool").batch(part)

            def seen(name: str, x: Tensor, inputs: object = inputs) -> None:
                rows = tokens(x.detach(), inputs).float()
                sums[name] = sums.get(name, torch.zeros(())) + (rows.T @ rows).double()
                counts[name] = counts.get(name, 0) + len(rows)

            with tapped(model.module, layers, seen):
                tasks.forward(theta, inputs, task)
    return {name: (s / max(1, counts[name])).float() for name, s in sums.items()}


def _terms(log_p: Tensor, batched: bool, key: str) -> Iterator[Tensor]:
    """The numbers whose squared gradients are summed."""
    p = log_p.detach().exp()
    if batched:
        yield (p.sqrt() * log_p).sum()
    elif log_p.shape[1] <= 32:
        for c in range(log_p.shape[1]):
            yield p[0, c].sqrt() * log_p[0, c]
    else:
        drawn = int(torch.searchsorted(p[0].cumsum(0), uniform((1,), key)[0].to(p)).clamp(max=log_p.shape[1] - 1))
        yield log_p[0, drawn]


def _each(label: str, tvs: TaskVectors, of: Callable[[str], dict[str, Tensor]], folder: Path, run: Run) -> Statistics:
    files = {}
    with run.progress.track(label, len(tvs.tasks), "task") as bar:
        for task in tvs.tasks:
            files[task] = folder / f"{task}.safetensors"
            found = of(task)
            save_file({name: found[name].cpu().contiguous() for name in tvs if name in found}, files[task])
            bar.advance(1, task=task)
    return Statistics(files)
