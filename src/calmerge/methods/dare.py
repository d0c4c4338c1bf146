"""DARE (Yu et al., ICML 2024)."""

from calmerge._signature import Fraction, Seed, check, raise_together
from calmerge._task_vectors import Merge, TaskVectors
from calmerge._weights import Weights
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.drop import drop_and_rescale


def dare(tvs: TaskVectors, *, rate: Fraction = 0.9, inner: Merge = task_arithmetic, seed: Seed = 0) -> Weights:
    """Drop entries of each task vector at random, rescale the rest, then merge with any method.

    tau_hat_t = (1 - m_t) * tau_t / (1 - p), m_t ~ Bernoulli(p); theta = inner(tau_hat).

    Args:
        tvs: task vectors of T experts.
        rate: p, the share dropped, in [0, 1]. 0.9 suits small deltas; large ones (continued pre-training, high
            learning rates) want 0.2 to 0.5.
        inner: the merge that follows; with `ties` this is the DARE-TIES of the official code, trim included.
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
    raise_together(check(dare, {"rate": rate, "seed": seed}))
    return inner(drop_and_rescale(tvs, rate=rate, seed=seed))
