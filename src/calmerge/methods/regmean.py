"""RegMean and RegMean++: linear layers as least-squares fits to all experts' outputs."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from calmerge._layers import layers
from calmerge._run import Run
from calmerge._signature import Count, Fraction, NonNegative, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Site, StateDict, Weights
from calmerge.fitting.calibrate import gram_of, grams
from calmerge.pieces.blend import averaged, summed
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Tasks
from calmerge.tasks.taps import is_transposed, linear_layers, open_model


def regmean(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    examples: Count = 256,
    ratio: Fraction = 0.9,
    damping: NonNegative = 1e-6,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """Every linear layer as close as can be to what each expert's layer gives on its own inputs; means for the rest.

    G_t = mean of x x^T over the tokens x that the layer is given in expert t; G~_t = a G_t + (1 - a) diag(G_t);
    W^T = (sum_t G~_t)^-1 sum_t G~_t W_t^T.

    Args:
        tvs: task vectors of T experts.
        tasks: a model that shows its module, and unlabelled pools.
        examples: of each pool.
        ratio: a, what stays of the entries off the diagonal, in [0, 1]; FusionBench takes 0.95 for CLIP and 0.6 for
            GPT-2.
        damping: share of the mean diagonal that draws the solution to the mean of the experts, for inputs that no
            expert uses.
        seed: decides which examples.
        run: progress, and the trace.

    Held in memory: one expert while it is run, then one layer's T Gram matrices; on disk, all of them.

    Raises:
        DataError: a task has no pool, or the model does not show its module.

    >>> import inspect
    >>> inspect.signature(regmean).parameters["ratio"].default
    0.9

    Source: Jin, Ren, Preotiuc-Pietro, Cheng, "Dataless Knowledge Fusion by Merging Weights of Language Models",
    ICLR 2023; bloomberg/dataless-model-merging; read in tanganke/fusion_bench (MIT).
    Differences: padding is left out of the Gram matrices; a damped Cholesky solution replaces the inverse.
    """
    options = {"examples": examples, "ratio": ratio, "damping": damping, "seed": seed}
    raise_together(check(regmean, {"tasks": tasks, **options}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    run.trace["regmean"] = FitTrace(loss=[])
    transposed = _transposed(tvs, tasks)
    with tempfile.TemporaryDirectory(prefix="calmerge-regmean-") as folder:
        found = grams(tvs, tasks, Path(folder), examples=examples, seed=seed, run=run)
        return materialise(least_squares(tvs, found, ratio=ratio, damping=damping, transposed=transposed))


def regmean_pp(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    examples: Count = 256,
    ratio: Fraction = 0.95,
    damping: NonNegative = 1e-6,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """RegMean block by block, each block's inputs taken behind the blocks that are merged already.

    For block l = 1 .. L: G_t from a forward pass of the model whose tensors before block l are merged, and whose block
    l is expert t's; then the block's layers as in `regmean`. Tensors outside the blocks are means, set first.

    Args:
        tvs: task vectors of T experts.
        tasks: a model that shows its module, and unlabelled pools.
        examples: of each pool.
        ratio: as for `regmean`, like all that follow.
        damping: draws the solution to the experts' mean.
        seed: decides which examples.
        run: progress, and the trace.

    Held in memory: two models and one block's Gram matrices of all tasks. Takes L forward passes of every example
    instead of one, since nothing is known of how a model calls its blocks.

    Raises:
        DataError: a task has no pool, or the model does not show its module.

    >>> import inspect
    >>> inspect.signature(regmean_pp).parameters["ratio"].default
    0.95

    Source: Nguyen, Huu-Tien, Suzuki, Nguyen, "RegMean++: Enhancing Effectiveness and Generalization of Regression
    Mean for Model Merging", arXiv 2025; nthehai01/RegMean-plusplus (MIT).
    Differences: the official code leaves the last LayerNorm at the base's values; here it is the experts' mean, as
    every tensor outside the blocks.
    """
    options = {"examples": examples, "ratio": ratio, "damping": damping, "seed": seed}
    raise_together(check(regmean_pp, {"tasks": tasks, **options}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    run.trace["regmean_pp"] = FitTrace(loss=[])
    transposed, linear_names = _transposed(tvs, tasks), linear_layers(open_model(tasks, _WHY), tvs)
    delta = dict(materialise(tvs.reduce(lambda tau, site: averaged(tau))))
    blocks = _blocks(tvs)
    with run.progress.track("RegMean++", len(blocks) * len(tvs.tasks), "block") as bar:
        for names in blocks:
            per_task, linear = [], [n for n in names if n in linear_names]
            for task in tvs.tasks:
                theta = {n: tvs.base.read(n).float() + delta[n] for n in tvs}
                own = tvs.only([task]).only_names(names)
                theta |= {n: tvs.base.read(n).float() + own[n][0] for n in names}
                per_task.append(
                    gram_of(tvs, tasks, task, theta, linear, examples=examples, seed=seed) if linear else {}
                )
                bar.advance(1, task=task)
            found = StateDict({n: torch.stack([g[n] for g in per_task]) for n in per_task[0]})
            block = least_squares(tvs.only_names(names), found, ratio=ratio, damping=damping, transposed=transposed)
            delta |= dict(block)
    return StateDict(delta)


def least_squares(
    tvs: TaskVectors, found: Weights, *, ratio: float, damping: float, transposed: frozenset[str] = frozenset()
) -> Weights:
    """The linear layers of least summed squared error under given Gram matrices, and means of all other tensors.

    Args:
        tvs: task vectors.
        found: by weight, G, [T, in, in].
        ratio: a, what stays of the entries off the diagonal.
        damping: share of the mean diagonal that draws to the mean.
        transposed: weights kept as [in, out].

    >>> from calmerge import StateDict
    >>> experts = {"a": {"w": torch.tensor([[1.0]])}, "b": {"w": torch.tensor([[4.0]])}}
    >>> G = StateDict({"w": torch.tensor([[[2.0]], [[1.0]]])})
    >>> least_squares(task_vectors({"w": torch.zeros(1, 1)}, experts), G, ratio=1.0, damping=0.0)["w"]
    tensor([[2.]])
    """

    def solved(tau: Tensor, site: Site) -> Tensor:
        if site.name not in found.specs:
            return averaged(tau)
        g = found.read(site.name).to(tau.device).double()
        shrunk = ratio * g + (1 - ratio) * torch.diag_embed(g.diagonal(dim1=1, dim2=2))
        wide = tau.double() if site.name in transposed else tau.double().transpose(1, 2)  # [T, in, out]
        left = summed(shrunk)
        ridge = damping * left.diagonal().mean()
        left = left + ridge * torch.eye(len(left), dtype=left.dtype, device=left.device)
        right = summed(shrunk @ wide) + ridge * averaged(wide)
        chol, failed = torch.linalg.cholesky_ex(left)
        answer = (
            torch.linalg.lstsq(left, right, driver="gelsd").solution if failed else torch.cholesky_solve(right, chol)
        )
        return (answer if site.name in transposed else answer.T).float()

    return tvs.reduce(solved, elementwise=False)


_WHY = "RegMean watches its linear layers"


def _transposed(tvs: TaskVectors, tasks: Tasks) -> frozenset[str]:
    model = open_model(tasks, _WHY)
    found = linear_layers(model, tvs)
    return frozenset(n for n, path in found.items() if is_transposed(model.module.get_submodule(path)))


def _blocks(tvs: TaskVectors) -> list[list[str]]:
    """The names of every block, in the order that an input meets them; a model without blocks is one."""
    by_block: dict[tuple[bool, str, int], list[str]] = {}
    for name, place in layers(tvs.base).items():
        if name in tvs.specs:
            by_block.setdefault(("decoder" in place.stack, place.stack, place.index), []).append(name)
    return [by_block[key] for key in sorted(by_block)] or [list(tvs)]
