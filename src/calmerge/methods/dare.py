"""DARE (Yu et al., ICML 2024)."""

from typing import Annotated, Literal

from calmerge._signature import Fraction, Interval, KeepFraction, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors
from calmerge._weights import Weights
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.methods.ties import ties
from calmerge.pieces.drop import drop_and_rescale


def dare(
    tvs: TaskVectors,
    *,
    rate: Fraction = 0.9,
    inner: Merge = task_arithmetic,
    rescale: bool = True,
    seed: Seed = 0,
) -> Weights:
    """Drop entries of each task vector at random, rescale the rest, then merge with any method.

    tau_hat_t = (1 - m_t) * tau_t / (1 - p), m_t ~ Bernoulli(p); theta = inner(tau_hat).

    Args:
        tvs: task vectors of T experts.
        rate: p, the share dropped, in [0, 1]. 0.9 suits small deltas; large ones (continued pre-training, high
            learning rates) want 0.2 to 0.5.
        inner: the merge that follows; with `ties` this is the DARE-TIES of the official code, trim included.
        rescale: divide what is left by 1 - p; without it this is the ablation "DropOnly", the official code's default.
        seed: names the draw; results are random, so report several.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3)}})
    >>> dare(tvs, rate=0.0)["w"]
    tensor([0.6000, 0.6000, 0.6000])

    Source: Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario", ICML 2024; yule-BUAA/MergeLM (no licence file in
    the copy read).
    Differences: the official code rescales only when asked to, and draws from one global stream, so that order matters;
    here survivors are rescaled as in the paper, and a draw is a function of (seed, tensor, task, entry).
    """
    raise_together(check(dare, {"rate": rate, "rescale": rescale, "seed": seed}))
    return inner(drop_and_rescale(tvs, rate=rate, rescale=rescale, seed=seed))


def dare_ties(
    tvs: TaskVectors,
    *,
    rate: Fraction = 0.5,
    trimmed: bool = True,
    keep: KeepFraction = 0.2,
    scale: Annotated[float, Interval()] = 1.0,
    combine: Literal["mean", "sum", "max"] = "mean",
    seed: Seed = 0,
) -> Weights:
    """DARE, then TIES: with its trim as in the official code, or straight to the election as other tools have it.

    Two algorithms go by this name. `trimmed` says which: the sparse vectors are trimmed to the share K of all entries
    (official code, FusionBench), or not at all (mergekit and PEFT, whose other rules `mergekit_dare_ties` has).

    Args:
        tvs: task vectors of T experts.
        rate: p of DARE, the share dropped at random, in [0, 1].
        trimmed: whether TIES trims what is left.
        keep: K of TIES, in (0, 1]. Above 1 - p the threshold is 0 and nothing is trimmed.
        scale: lambda of TIES.
        combine: of TIES; FusionBench has `sum` with `scale=0.5`.
        seed: names the draw.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([4.0, 1.0, -1.0])}, "b": {"w": torch.tensor([2.0, -3.0, 0.5])}}
    >>> dare_ties(task_vectors({"w": torch.zeros(3)}, experts), rate=0.0, trimmed=False)["w"]
    tensor([ 3., -3., -1.])

    Source: Yu, Yu, Yu, Huang, Li, "Language Models are Super Mario", ICML 2024; yule-BUAA/MergeLM (no licence file in
    the copy read). TIES of Yadav et al., NeurIPS 2023.
    """
    options = {"rate": rate, "trimmed": trimmed, "keep": keep, "scale": scale, "combine": combine, "seed": seed}
    raise_together(check(dare_ties, options))
    dropped = drop_and_rescale(tvs, rate=rate, seed=seed)
    return ties(dropped, keep=keep if trimmed else 1.0, scale=scale, combine=combine)
