"""Which unlabelled examples take part, what they should come out as, and in which batches they come."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calmerge._random import permutation
from calmerge._signature import KeepFraction, check, raise_together
from calmerge.tasks.base import Batch, Batches, Tasks

Sampling = Literal["class_balanced", "plain", "all"]


@dataclass(frozen=True)
class Pool:
    """Examples of one task with what they should come out as.

    Attributes:
        indices: which examples of the task's pool, [n].
        targets: a label, logits or features for each of them, [n, ...]; None for objectives without targets.
    """

    indices: Tensor
    targets: Tensor | None = None

    def split(self, share: float, *key: object) -> "tuple[Pool, Pool]":
        """Two parts: a share `1 - share` to learn from, and `share` held out (at least one example where `share` > 0).

        >>> learn, held = Pool(torch.arange(10)).split(0.2, 0, "cars")
        >>> len(learn.indices), len(held.indices)
        (8, 2)
        """
        order = permutation(len(self.indices), *key, "held out")
        n = max(1, round(share * len(order))) if share > 0 else 0
        held, learn = order[:n].sort().values, order[n:].sort().values
        return self._at(learn), self._at(held)

    def _at(self, chosen: Tensor) -> "Pool":
        return Pool(self.indices[chosen], None if self.targets is None else self.targets[chosen])


def whole_pools(tasks: Tasks, names: Iterable[str]) -> dict[str, Pool]:
    """Every example of the pools of some tasks, for objectives without targets."""
    return {task: Pool(torch.arange(len(tasks.split(task, "pool")))) for task in names}


@dataclass(frozen=True)
class Credible:
    """Examples of one pool with the labels that the task's expert gives them.

    Attributes:
        indices: which examples of the pool, [n].
        labels: their pseudo-labels, [n].
        coverage: for each class how many examples were predicted as it, and how many of these were kept: [classes, 2].
    """

    indices: Tensor
    labels: Tensor
    coverage: Tensor

    @property
    def pool(self) -> Pool:
        """The examples with their pseudo-labels as targets."""
        return Pool(self.indices, self.labels)


def entropies(logits: Tensor) -> Tensor:
    """The prediction entropy of every example in nats, float64: H_i = -sum_c p_ic ln(p_ic + 1e-9).

    Probabilities come from a log-softmax, so that large logits do not overflow as in the official code.

    >>> entropies(torch.tensor([[5.0, 0.0], [900.0, 899.0]])).round(decimals=4)
    tensor([0.0402, 0.5822], dtype=torch.float64)
    """
    p = logits.double().log_softmax(1).exp()
    return -(p * (p + 1e-9).log()).sum(1)


def credible(logits: Tensor, *, ratio: KeepFraction = 0.9, sampling: Sampling = "class_balanced") -> Credible:
    """The examples whose expert predictions have the lowest entropy, with these predictions as labels.

    Class-balanced: in every group of one pseudo-label the floor(ratio * group size) examples of lowest entropy; a class
    predicted once therefore keeps none at ratio 0.9. Plain: the floor(ratio * n) of lowest entropy of all.
    All: everything.

    Args:
        logits: of the task's own expert over its pool, [n, classes].
        ratio: share kept, in (0, 1].
        sampling: `class_balanced`, `plain` or `all`.

    >>> logits = torch.tensor([[5.0, 0], [4, 0], [3, 0], [2, 0], [1, 0], [0, 0.5], [0, 0.4]])
    >>> credible(logits, ratio=0.5, sampling="plain").indices, credible(logits, ratio=0.5).indices
    (tensor([0, 1, 2]), tensor([0, 1, 5]))

    Source: Yan et al., "CALM: Consensus-Aware Localized Merging for Multi-Task Learning", ICML 2025.
    """
    raise_together(check(credible, {"ratio": ratio, "sampling": sampling}))
    labels = logits.argmax(1)
    order = entropies(logits).argsort(stable=True)
    classes = logits.shape[1]
    predicted = torch.bincount(labels, minlength=classes)
    if sampling == "all":
        chosen = torch.arange(len(logits))
    elif sampling == "plain":
        chosen = order[: int(ratio * len(logits))]
    else:
        groups = [order[labels[order] == c] for c in range(classes)]
        chosen = torch.cat([group[: int(ratio * len(group))] for group in groups])
    indices = chosen.sort().values
    kept = torch.bincount(labels[indices], minlength=classes)
    return Credible(indices, labels[indices], torch.stack([predicted, kept], 1))


def shuffled(
    pools: Mapping[str, Pool],
    *,
    size: int,
    count: int,
    fresh: bool = False,
    seed: object = 0,
) -> Batches:
    """For every update and task, the first `count` batches of a new shuffle of the task's pool.

    Args:
        pools: by task, which examples, and what they should come out as.
        size: examples per batch; the last batch of a small pool is shorter.
        count: batches per task and update; fewer where the pool has fewer.
        fresh: draw every batch from a shuffle of its own, so that a small pool still gives `count` batches.
        seed: with the task's name and the number of the update it decides the shuffle.

    >>> batches = shuffled({"cars": Pool(torch.arange(5))}, size=3, count=2)
    >>> [len(batch.indices) for batch in batches(0)]
    [3, 2]
    """

    def of(step: int) -> Iterator[Batch]:
        for task, pool in pools.items():
            n = len(pool.indices)
            for b in range(count):
                if fresh:
                    picked = permutation(n, seed, "batch", task, step, b)[:size]
                else:
                    picked = permutation(n, seed, "batch", task, step)[b * size : (b + 1) * size]
                if len(picked):
                    yield Batch(task, pool.indices[picked], None if pool.targets is None else pool.targets[picked])

    return of
