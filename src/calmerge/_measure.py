"""Exact numbers over whole models: thresholds, counts, norms. Each is declared first and found when it is needed.

A `Measure` is a node of the lazy graph, an input of a computation like the tensors are. `settle` walks a graph and
finds all its pending measures with as few passes over the weights as their dependencies allow: those that are ready
share one pass, every block is read once, and blocks are spread over threads.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from calmerge._run import Run
from calmerge._weights import Memo, Node, Number, Site, Weights, blocks, entries, site_of, value_at

A = TypeVar("A")
B = TypeVar("B")
W = TypeVar("W", bound=Weights)

Pass = Callable[..., Tensor]
"""From the blocks of a measure's inputs (and its settled measures) and their `Site` to partial sums of one shape."""
Rounds = Callable[[], Generator[Pass, Tensor, Tensor]]
"""Yields a pass, is sent its sum over all blocks, and so on; returns the number."""

_HALF = 1 << 16


class Measure(Number):
    """A tensor of numbers over whole weights, found in one or more passes when it is first asked for.

    Given to `transform`, `reduce` or `Computed` beside weights, it is handed to their function as a tensor.

    Args:
        inputs: weights of the same names whose blocks each pass is called with, and measures that come before.
        rounds: the passes, as a generator (see `Rounds`).
        passes: how many there are at most; 0 for what follows from other measures alone.
    """

    def __init__(self, inputs: tuple[Node, ...], rounds: Rounds, *, passes: int) -> None:
        self.inputs, self.passes = inputs, passes
        self._rounds = rounds
        self._value: Tensor | None = None
        self._lock = threading.RLock()

    @property
    def settled(self) -> bool:
        """Whether the number has been found."""
        return self._value is not None

    def value(self) -> Tensor:
        """The number; the passes are made if they have not been, once, whichever thread asks."""
        with self._lock:
            if self._value is None:
                settle([self])
        assert self._value is not None
        return self._value

    def settle_as(self, number: Tensor) -> None:
        """Take a number that an earlier run found."""
        self._value = number

    def at(self, site: Site) -> Tensor:
        """What a computation at `site` is handed: the number."""
        return self.value()

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Measure":
        """The measure `fn(number)`, without another pass.

        >>> from calmerge import StateDict
        >>> squares = total(StateDict({"a": torch.tensor([3.0, 4.0])}), lambda w: w.double().square().sum())
        >>> squares.map(torch.sqrt).value()
        tensor(5., dtype=torch.float64)
        """

        def rounds() -> Generator[Pass, Tensor, Tensor]:
            yield from ()
            return fn(self.value())

        return Measure((self,), rounds, passes=0)


def total(weights: Weights, fn: Callable[[Tensor], Tensor]) -> Measure:
    """The sum over all blocks of `fn(block)`, in float64 and in a fixed order, so that it never depends on chunking.

    Args:
        weights: any weights; task vectors hand `fn` blocks of shape [T, rows, ...].
        fn: from one block to a tensor of sums, of the same shape for every block.

    >>> from calmerge import StateDict
    >>> total(StateDict({"a": torch.tensor([3.0, 4.0])}), lambda w: w.double().sum()).value()
    tensor(7., dtype=torch.float64)
    """

    def rounds() -> Generator[Pass, Tensor, Tensor]:
        return (yield lambda w, site: fn(w).to(torch.float64))

    return Measure((weights,), rounds, passes=1)


def kth_magnitude(weights: Weights, k: "int | Sequence[int] | Measure") -> Measure:
    """The k-th smallest |w| (k = 1 is the smallest), exact, counted over all tensors together.

    Magnitudes of floats order like their bits, so one pass counts the upper half-words and a second one the lower
    half-words inside the bin that holds rank k: 2^15 + 2^16 counters a task, whatever the size of the model.

    Args:
        weights: float tensors; of task vectors ([T, ...]) one threshold for each task comes out.
        k: rank, from 1 to the number of entries; one for all tasks, or one for each; it may be a measure itself.

    Returns:
        A measure: float32, of shape [T] for task vectors and [1] otherwise.

    >>> from calmerge import StateDict
    >>> kth_magnitude(StateDict({"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([2.0])}), 2).value()
    tensor([2.])
    """
    stacked = getattr(weights, "row_dim", 0)
    n = len(weights.tasks) if stacked else 1  # type: ignore[attr-defined]

    def ranks() -> Tensor:
        found = k.value() if isinstance(k, Measure) else torch.tensor(k)
        return found.long().reshape(-1, 1).expand(n, 1).contiguous()

    def count(key: Callable[[Tensor], Tensor], bins: int) -> Pass:
        def counted(block: Tensor, *_: object) -> Tensor:
            bits = block.cpu().reshape(n, -1).float().contiguous().view(torch.int32) & 0x7FFFFFFF
            keys = key(bits)  # [n, entries], bins where an entry does not count
            keys = keys + torch.arange(n)[:, None] * (bins + 1)
            return torch.bincount(keys.flatten(), minlength=n * (bins + 1)).reshape(n, bins + 1)[:, :bins]

        return counted

    def rounds() -> Generator[Pass, Tensor, Tensor]:
        if not weights.numel:
            return torch.zeros(n)
        high_counts = (yield count(lambda bits: (bits >> 16).long(), _HALF // 2)).cumsum(1)
        high = torch.searchsorted(high_counts, ranks())[:, 0]  # first bin whose running count reaches k
        below = torch.where(high > 0, high_counts.gather(1, (high - 1).clamp(min=0)[:, None])[:, 0], 0)

        def inside(bits: Tensor) -> Tensor:
            return torch.where((bits >> 16) == high[:, None], bits & 0xFFFF, _HALF).long()

        low_counts = (yield count(inside, _HALF)).cumsum(1)
        low = torch.searchsorted(low_counts, ranks() - below[:, None])[:, 0]
        return ((high << 16) | low).to(torch.int32).view(torch.float32)

    return Measure((weights, k) if isinstance(k, Measure) else (weights,), rounds, passes=2)


class PerTensor(Number):
    """One measure for every tensor: a computation at a site is handed that tensor's number.

    >>> from calmerge import StateDict
    >>> weights = StateDict({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([2.0])})
    >>> norms = per_tensor(weights, lambda w: total(w, lambda x: x.abs().sum()))
    >>> weights.map(lambda w, norm, site: w / norm.float(), norms)["b"]
    tensor([1.])
    """

    def __init__(self, measures: Mapping[str, Measure]) -> None:
        self._measures = measures
        self.inputs = tuple(measures.values())

    def at(self, site: Site) -> Tensor:
        """The number of the tensor at `site`."""
        return self._measures[site.name].value()


def per_tensor(weights: W, measure: Callable[[W], Measure]) -> PerTensor:
    """`measure` of each tensor alone; see `PerTensor`."""
    return PerTensor({name: measure(weights.only_names([name])) for name in weights.specs})


def pending(nodes: Iterable[Node]) -> list[Measure]:
    """The measures that `nodes` depend on and that are not settled, those that come first before those that need them.

    >>> from calmerge import StateDict
    >>> first = total(StateDict({"w": torch.ones(2)}), torch.sum)
    >>> pending([first.map(torch.sqrt)])[0] is first
    True
    """
    found: dict[int, Measure] = {}
    seen: set[int] = set()

    def visit(node: Node) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, Measure) and node.settled:
            return
        for one in node.inputs:
            visit(one)
        if isinstance(node, Measure):
            found[id(node)] = node

    for node in nodes:
        visit(node)
    return list(found.values())


def settle(nodes: Iterable[Node], *, threads: int | None = None, run: Run | None = None) -> None:
    """Find every number that `nodes` depend on; those that are ready together share a pass over the weights.

    Args:
        nodes: weights or measures.
        threads: blocks worked on at a time; as many as there are cores when None. Changes no bit.
        run: progress in entries.

    >>> from calmerge import StateDict
    >>> number = total(StateDict({"w": torch.ones(2)}), torch.sum)
    >>> settle([number.map(torch.sqrt)])
    >>> number.settled
    True
    """
    for stage in stages(nodes):
        with workers(threads or os.cpu_count() or 1) as pool:
            for group in stage:
                _side_by_side(group, pool, threads or os.cpu_count() or 1, run or Run())


def stages(nodes: Iterable[Node]) -> list[list[list[Measure]]]:
    """The pending measures of `nodes`, in the order in which `settle` finds them.

    Those of one stage depend only on earlier stages; in it, those over the same blocks stand together and share passes.

    >>> from calmerge import StateDict
    >>> first = total(StateDict({"w": torch.ones(2)}), torch.sum)
    >>> [[len(group) for group in stage] for stage in stages([first.map(torch.sqrt), first])]
    [[1], [1]]
    """
    found: list[list[list[Measure]]] = []
    waiting = pending(nodes)
    needs = {id(m): {id(n) for n in pending(m.inputs)} for m in waiting}
    while waiting:
        missing = {id(m) for m in waiting}
        ready = [m for m in waiting if not needs[id(m)] & missing]
        groups: dict[object, list[Measure]] = {}
        for measure in ready:
            weights = [n for n in measure.inputs if isinstance(n, Weights)]
            grid = (tuple(weights[0].specs.items()), all(w.elementwise for w in weights)) if weights else id(measure)
            groups.setdefault(grid, []).append(measure)
        found.append(list(groups.values()))
        waiting = [m for m in waiting if id(m) not in {id(r) for r in ready}]
    return found


def _side_by_side(group: Sequence[Measure], pool: ThreadPoolExecutor, threads: int, run: Run) -> None:
    """Run the rounds of some measures in step: their first passes as one, then their second, and so on."""
    running = [(measure, measure._rounds()) for measure in group]
    sums: list[Tensor | None] = [None] * len(running)
    while running:
        going: list[tuple[Measure, Generator[Pass, Tensor, Tensor], Pass]] = []
        for (measure, rounds), found in zip(running, sums, strict=True):
            try:
                going.append((measure, rounds, next(rounds) if found is None else rounds.send(found)))
            except StopIteration as done:
                measure._value = done.value
        running = [(measure, rounds) for measure, rounds, _ in going]
        sums = [*_one_pass([(measure, fn) for measure, _, fn in going], pool, threads, run)] if going else []


def _one_pass(
    work: Sequence[tuple[Measure, Pass]], pool: ThreadPoolExecutor, threads: int, run: Run
) -> list[Tensor | None]:
    """The sum of every pass over all blocks, each of which is read once."""
    inputs = [n for measure, _ in work for n in measure.inputs if isinstance(n, Weights)]
    weights = next((w for w in inputs if not w.elementwise), inputs[0])

    def partial(block: tuple[str, slice]) -> tuple[int, list[Tensor]]:
        name, rows = block
        memo: Memo = {}
        site = site_of(weights, name, rows)
        return entries(weights, name, rows), [
            fn(*(value_at(node, site, rows, memo) for node in m.inputs), site).cpu() for m, fn in work
        ]

    sums: list[Tensor | None] = [None] * len(work)
    with run.progress.track("measuring", weights.numel, "entry") as bar:
        for n, parts in ahead(pool, partial, blocks(weights), 2 * threads):  # in order: float sums depend on it
            sums = [part if old is None else old + part for old, part in zip(sums, parts, strict=True)]
            bar.advance(n)
    return [torch.zeros((), dtype=torch.float64) if found is None else found for found in sums]


def ahead(pool: ThreadPoolExecutor, fn: Callable[[A], B], items: Iterable[A], most: int) -> Iterator[B]:
    """`fn` of every item, in order, with at most `most` of them begun and not yet handed out.

    >>> with workers(2) as pool:
    ...     list(ahead(pool, abs, [-1, 2, -3], 2))
    [1, 2, 3]
    """
    begun: deque[Future[B]] = deque()
    for item in items:
        begun.append(pool.submit(fn, item))
        if len(begun) >= most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute with one torch thread each: blocks are the parallelism.

    >>> with workers(2) as pool:
    ...     list(pool.map(abs, [-1, 2]))
    [1, 2]
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
