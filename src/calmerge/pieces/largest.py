"""The largest entries of every tensor, exactly as many as asked for, in any weights that can be read by rows."""

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from calmerge._measure import Measure, Pass, PerTensor, kth_magnitude
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights

_HALF = 1 << 16
_STEP = 2654435769  # 2^32 over the golden ratio, odd: i -> i * _STEP mod 2^32 is one to one and spreads its values
Counts = Callable[[str, int], Sequence[int] | Measure]
"""From name and size of a tensor to how many of its entries each task keeps."""


def keep_largest(tvs: TaskVectors, counts: Counts) -> TaskVectors:
    """Task vectors with all but the largest entries of every tensor set to 0; see `largest` for `counts` and ties.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([3.0, -1.0, 2.0, 0.5])}})
    >>> keep_largest(tvs, lambda name, n: [2])["w"]
    tensor([[3., 0., 2., 0.]])
    """
    return tvs.transform(lambda tau, cut, site: tau.where(among(tau, cut, site), 0.0), largest(tvs, counts))


def largest(weights: Weights, counts: Counts) -> PerTensor:
    """For every tensor, where the cut lies that leaves exactly its largest entries; `among` reads it.

    Equal magnitudes at the cut are common where weights are stored in few bits. Of them as many stay as are wanted,
    spread evenly over the tensor: those first whose index i has the smallest i * 2654435769 mod 2^32. That is a rule
    of the index alone, so that no block size changes the choice. A cut at magnitude 0 keeps every zero.

    Args:
        weights: float tensors; of task vectors, one cut for each task.
        counts: from name and number of entries of a tensor to how many stay, for each task (of other weights, one
            number); 0 keeps none, the number of entries keeps all. It may give a measure.

    >>> from calmerge import StateDict
    >>> weights = StateDict({"w": torch.tensor([3.0, -1.0, 2.0, 0.5])})
    >>> weights.map(among, largest(weights, lambda name, n: [2]))["w"]
    tensor([ True, False,  True, False])
    """
    return PerTensor(
        {name: _cut(weights.only_names([name]), counts(name, spec.numel)) for name, spec in weights.specs.items()}
    )


def among(tensor: Tensor, cut: Tensor, site: Site) -> Tensor:
    """Whether each entry of a block is among the largest, by the `cut` of `largest`: [T, 2] for blocks [T, ...]."""
    rows = tensor.reshape(len(cut), -1)
    size, at = rows.abs(), cut[:, :1].to(tensor)
    chosen = size > at
    equal = size == at
    if bool((cut[:, 1] < 1 << 32).any()):
        index = torch.arange(site.offset, site.offset + rows.shape[1], device=tensor.device)
        equal &= _spread(index) <= cut[:, 1:].to(tensor.device)
    return (chosen | equal).reshape(tensor.shape)


def _spread(index: Tensor) -> Tensor:
    return (index * _STEP) & 0xFFFFFFFF


def _cut(weights: Weights, counts: Sequence[int] | Measure) -> Measure:
    """[T, 2]: the smallest magnitude that stays, and the largest spread index with which it does."""
    n, tasks = weights.numel, len(weights.tasks) if isinstance(weights, TaskVectors) else 1

    def wanted() -> Tensor:
        found = counts.value() if isinstance(counts, Measure) else torch.tensor(counts)
        return found.long().reshape(-1, 1).expand(tasks, 1)[:, 0]

    if isinstance(counts, Measure):
        threshold = kth_magnitude(weights, counts.map(lambda k: (n + 1 - k.long()).clamp(1, max(1, n))))
    else:
        if all(k <= 0 or k >= n for k in counts):
            return Measure((), lambda: _trivial(wanted(), n), passes=0)
        threshold = kth_magnitude(weights, [min(max(n + 1 - k, 1), n) for k in counts])

    def counted(block: Tensor, at: Tensor, site: Site) -> Tensor:
        size = block.reshape(tasks, -1).abs()
        above = (size > at[:, None].to(size)).sum(1).cpu()
        task, index = ((size == at[:, None].to(size)) & (size > 0)).nonzero(as_tuple=True)
        bins = (task * _HALF + (_spread(index + site.offset) >> 16)).cpu()
        return torch.cat([above[:, None], torch.bincount(bins, minlength=tasks * _HALF).reshape(tasks, _HALF)], 1)

    def rounds() -> Generator[Pass, Tensor, Tensor]:
        at, k = threshold.value(), wanted()
        found = yield counted
        left = k[:, None] - found[:, :1]  # how many of the equal ones stay
        high, before = _bin_of(found[:, 1:], left)
        limit = ((high + 1) << 16) - 1
        if bool((before + _at(found[:, 1:], high) > left).any()):  # more than wanted in the last bin: look inside it

            def inside(block: Tensor, at: Tensor, site: Site) -> Tensor:
                size = block.reshape(tasks, -1).abs()
                task, index = ((size == at[:, None].to(size)) & (size > 0)).nonzero(as_tuple=True)
                key = _spread(index + site.offset).cpu()
                task, key = (x[key >> 16 == high[task.cpu(), 0]] for x in (task.cpu(), key))
                return torch.bincount(task * _HALF + (key & 0xFFFF), minlength=tasks * _HALF).reshape(tasks, _HALF)

            low, _ = _bin_of((yield inside), left - before)
            limit = (high << 16) + low
        every = found[:, 1:].sum(1, keepdim=True) <= left
        cut = torch.stack([at.double(), torch.where(every, 1 << 32, limit)[:, 0].double()], 1)
        return torch.where(((k <= 0) | (k >= n))[:, None], _whole(k, n), cut)

    return Measure((weights, threshold), rounds, passes=2)


def _bin_of(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The first bin where the running count reaches what is wanted, and the count before it; both [T, 1]."""
    running = counts.cumsum(1)
    found = torch.searchsorted(running, wanted.to(running)).clamp(max=counts.shape[1] - 1)
    return found, _at(running, found) - _at(counts, found)


def _at(counts: Tensor, index: Tensor) -> Tensor:
    return counts.gather(1, index)


def _trivial(wanted: Tensor, n: int) -> Generator[Pass, Tensor, Tensor]:
    yield from ()
    return _whole(wanted, n)


def _whole(wanted: Tensor, n: int) -> Tensor:
    """The cut that keeps everything where n are wanted, and nothing otherwise."""
    at = torch.where(wanted >= n, -1.0, torch.inf).double()
    return torch.stack([at, torch.full_like(at, 2.0**32)], 1)
