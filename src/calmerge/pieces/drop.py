"""Dropping entries at random."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from calmerge._random import bernoulli
from calmerge._signature import Fraction, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._watch import Array, leaf
from calmerge._weights import ALL, Memo, Node, Spec, Weights, site_of


def drop_and_rescale(tvs: TaskVectors, *, rate: Fraction = 0.9, rescale: bool = True, seed: Seed = 0) -> TaskVectors:
    """Task vectors with a share `rate` of the entries set to 0 at random, the rest divided by 1 - rate.

    tau_hat = (1 - m) * tau / (1 - p), m ~ Bernoulli(p), independent for every task and entry and a function of (seed,
    tensor name, task, entry) alone: neither the order of the experts nor the device changes it.

    Args:
        tvs: task vectors.
        rate: p, the share dropped, in [0, 1]; 0 draws nothing, 1 leaves nothing.
        rescale: without it nothing is divided ("DropOnly", the official code's default).
        seed: names the draw.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1000)}, {"a": {"w": torch.ones(1000)}})
    >>> drop_and_rescale(tvs, rate=0.75)["w"].unique()
    tensor([0., 4.])

    Source: what DARE does before another method merges (Yu, Yu, Yu, Huang, Li, ICML 2024); yule-BUAA/MergeLM (no
    licence file in the copy read).
    """
    raise_together(check(drop_and_rescale, {"rate": rate, "rescale": rescale, "seed": seed}))
    if rate == 0:
        return tvs
    factor = 1 / (1 - rate) if rescale and rate < 1 else 1.0
    thinned = drop(tvs, [rate] * len(tvs.tasks), seed=seed)
    return thinned if factor == 1 else thinned.transform(lambda tau, site: tau * factor)


def drop(tvs: TaskVectors, rates: Sequence[float], *, seed: int) -> TaskVectors:
    """Task vectors with a share of the entries of each set to 0 at random, the others as they are.

    Args:
        tvs: task vectors.
        rates: the share of each task, in [0, 1].
        seed: names the draw, as for `drop_and_rescale`.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.ones(3)}, "b": {"w": torch.ones(3)}})
    >>> drop(tvs, [0.0, 1.0], seed=0)["w"]
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    # a product with booleans takes four times as long
    return tvs.transform(
        lambda tau, gone, site: tau * (~gone).view(torch.uint8).to(tau.device), _Drawn(tvs, rates, seed)
    )


class _Drawn(Weights):
    """Booleans [T, ...], each true with the chance of its task."""

    row_dim = 1

    def __init__(self, tvs: TaskVectors, rates: Sequence[float], seed: int) -> None:
        self._rates, self._seed = dict(zip(tvs.tasks, rates, strict=True)), seed
        self.inputs, self.elementwise = (tvs,), tvs.elementwise  # beside which they are read
        self.specs = {name: Spec(spec.shape, torch.bool) for name, spec in tvs.specs.items()}

    def parts(self, name: str) -> Sequence[Node]:
        return ()

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        spec, offset = self.specs[name], site_of(self, name, rows).offset
        shape = (len(self._rates), *(spec.shape if rows == ALL else (rows.stop - (rows.start or 0), *spec.shape[1:])))
        drawn = np.empty(torch.Size(shape).numel(), np.uint8)
        fill = _Drawing(self, name)
        fill(rows, offset, drawn)
        return leaf(torch.from_numpy(drawn).view(torch.bool).view(shape), offset, fill)

    def draw(self, name: str, offset: int, into: Array) -> None:
        """The draws from an entry on, all of one task and then all of the next."""
        for (task, rate), row in zip(self._rates.items(), into.reshape(len(self._rates), -1), strict=True):
            gone = bernoulli(row.shape, rate, self._seed, name, task, offset=offset) if rate else torch.tensor(False)
            row[:] = gone.numpy()


class _Drawing(NamedTuple):
    """How a tape is handed the draws of a tensor."""

    drawn: _Drawn
    name: str

    def __call__(self, rows: slice, offset: int, into: Array) -> None:
        self.drawn.draw(self.name, offset, into)

    def of(self, name: str) -> "_Drawing":
        return _Drawing(self.drawn, name)
