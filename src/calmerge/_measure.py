"""Exact numbers over a whole model, read once or twice in blocks: thresholds, counts, norms."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calmerge._weights import Weights, blocks

_HALF = 1 << 16


def total(weights: Weights, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum over all blocks of `fn(block)`, in float64 and in a fixed order, so that it never depends on chunking.

    Args:
        weights: any weights; task vectors hand `fn` blocks of shape [T, rows, ...].
        fn: from one block to a tensor of sums, of the same shape for every block.

    >>> from calmerge import StateDict
    >>> total(StateDict({"a": torch.tensor([3.0, 4.0])}), lambda w: w.double().square().sum()).sqrt()
    tensor(5., dtype=torch.float64)
    """
    result = torch.zeros((), dtype=torch.float64)
    for name, rows in blocks(weights):
        result = result + fn(weights.read(name, rows)).cpu().to(torch.float64)
    return result


def kth_magnitude(weights: Weights, k: int | Sequence[int]) -> Tensor:
    """The k-th smallest |w| (k = 1 is the smallest), exact, counted over all tensors together.

    Magnitudes of floats order like their bits, so one pass counts the upper half-words and a second one the lower
    half-words inside the bin that holds rank k: 2^15 + 2^16 counters a task, whatever the size of the model.

    Args:
        weights: float tensors; of task vectors ([T, ...]) one threshold for each task comes out.
        k: rank, from 1 to the number of entries; one for all tasks, or one for each.

    Returns:
        float32, of shape [T] for task vectors and [1] otherwise.

    >>> from calmerge import StateDict
    >>> kth_magnitude(StateDict({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([2.0])}), 2)
    tensor([2.])
    """
    stacked = getattr(weights, "row_dim", 0)
    n = len(weights.tasks) if stacked else 1  # type: ignore[attr-defined]
    ranks = torch.tensor([k] * n if isinstance(k, int) else list(k))

    def count(key: Callable[[Tensor], Tensor], bins: int) -> Tensor:
        counts = torch.zeros(n, bins, dtype=torch.int64)
        for name, rows in blocks(weights):
            bits = weights.read(name, rows).cpu().reshape(n, -1).float().contiguous().view(torch.int32) & 0x7FFFFFFF
            keys = key(bits)  # [n, entries], bins where an entry does not count
            keys = keys + torch.arange(n)[:, None] * (bins + 1)
            counts += torch.bincount(keys.flatten(), minlength=n * (bins + 1)).reshape(n, bins + 1)[:, :bins]
        return counts

    high_counts = count(lambda bits: (bits >> 16).long(), _HALF // 2).cumsum(1)
    high = torch.searchsorted(high_counts, ranks[:, None])[:, 0]  # first bin whose running count reaches k
    below = torch.where(high > 0, high_counts.gather(1, (high - 1).clamp(min=0)[:, None])[:, 0], 0)

    def inside(bits: Tensor) -> Tensor:
        return torch.where((bits >> 16) == high[:, None], bits & 0xFFFF, _HALF).long()

    low = torch.searchsorted(count(inside, _HALF).cumsum(1), (ranks - below)[:, None])[:, 0]
    return ((high << 16) | low).to(torch.int32).view(torch.float32)


def later(measure: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`measure` put off until its number is first needed, then done once, whichever thread asks.

    >>> number = later(lambda: torch.tensor(2.0))
    >>> number() is number()
    True
    """
    lock = threading.Lock()
    result: list[Tensor] = []

    def get() -> Tensor:
        with lock:
            if not result:
                result.append(measure())
        return result[0]

    return get
