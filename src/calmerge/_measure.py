"""Exact numbers over whole models: thresholds, counts, norms. Each is declared first and found when it is needed.

A `Measure` is a node of the lazy graph, an input of a computation like the tensors are. `settle` walks a graph and
finds all its pending measures with as few passes over the weights as their dependencies allow: those that are ready
share one pass, every block is read once, and blocks are spread over threads.
"""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from calmerge._compiled import usable
from calmerge._handles import kept_open
from calmerge._passes import Fold as Fold
from calmerge._passes import Pass as Pass
from calmerge._passes import Sample, Spread, added, run_passes
from calmerge._passes import ahead as ahead
from calmerge._passes import workers as workers
from calmerge._passes import worthwhile as worthwhile
from calmerge._rank import held_at_most, rank_rounds, usual_passes
from calmerge._reader import Tapes
from calmerge._run import Run
from calmerge._weights import BLOCK, Node, Number, Site, Weights, experts_in

W = TypeVar("W", bound=Weights)

Rounds = Callable[[], Generator[Pass | Sample, Any, Tensor]]
"""Yields a pass, is sent what it found over all blocks, and so on; returns the number. A sample may come before each.
"""


class Measure(Number):
    """A tensor of numbers over whole weights, found in one or more passes when it is first asked for.

    Given to `transform`, `reduce` or `Computed` beside weights, it is handed to their function as a tensor.

    Args:
        inputs: weights of the same names whose blocks each pass is called with, and measures that come before.
        rounds: the passes, as a generator (see `Rounds`).
        passes: how many there are as a rule; 0 for what follows from other measures alone.
        holds: bytes that the passes hold beside their blocks, at most; a plan tells peak memory from it.
    """

    def __init__(self, inputs: tuple[Node, ...], rounds: Rounds, *, passes: int, holds: int = 0) -> None:
        self.inputs, self.passes, self.holds = inputs, passes, holds
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

    def map(self, fn: Callable[..., Tensor], *others: "Measure") -> "Measure":
        """The measure `fn(number, *others)`, without another pass.

        >>> from calmerge import StateDict
        >>> squares = total(StateDict({"a": torch.tensor([3.0, 4.0])}), lambda w: w.double().square().sum())
        >>> squares.map(torch.sqrt).value()
        tensor(5., dtype=torch.float64)
        """

        def rounds() -> Generator[Pass, Tensor, Tensor]:
            yield from ()
            return fn(self.value(), *(other.value() for other in others))

        return Measure((self, *others), rounds, passes=0)


def total(weights: Weights, fn: Callable[[Tensor], Tensor]) -> Measure:
    """The sum over all blocks of `fn(block)`, in float64 and in a fixed order, so that it never depends on chunking.

    Args:
        weights: any weights; task vectors hand `fn` blocks of shape [T, rows, ...].
        fn: from one block to a tensor of sums, of the same shape for every block. A task's entries lie together, but
            tasks may lie apart; what is rounded must not depend on that (see `_dot`).

    >>> from calmerge import StateDict
    >>> total(StateDict({"a": torch.tensor([3.0, 4.0])}), lambda w: w.double().sum()).value()
    tensor(7., dtype=torch.float64)
    """

    def rounds() -> Generator[Pass, Tensor, Tensor]:
        return (yield lambda w, site: fn(w).to(torch.float64))

    return Measure((weights,), rounds, passes=1)


def count(weights: Weights, fn: Callable[[Tensor], Tensor]) -> Measure:
    """The sum over all blocks of `fn(block)`, whole numbers below 2^53, for which the blocks' size makes no difference.

    Args:
        weights: any weights; task vectors hand `fn` blocks of shape [T, rows, ...].
        fn: from one block to a tensor of counts, of the same shape for every block.

    >>> from calmerge import StateDict
    >>> count(StateDict({"a": torch.tensor([3.0, 0.0])}), torch.count_nonzero).value()
    tensor(1., dtype=torch.float64)
    """

    def rounds() -> Generator[Pass, Tensor, Tensor]:
        return (yield Fold(lambda w, site: fn(w).to(torch.float64), added))

    return Measure((weights,), rounds, passes=1)


def kth_magnitude(weights: Weights, k: "int | Sequence[int] | Measure") -> Measure:
    """The k-th smallest |w| (k = 1 is the smallest), exact, counted over all tensors together.

    As a rule one pass, and a few megabytes, whatever the size of the model; see `_rank`.

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

    def ranks() -> list[int]:
        found = k.value() if isinstance(k, Measure) else torch.tensor(k)
        return [int(rank) for rank in found.reshape(-1, 1).expand(n, 1)[:, 0]]

    inputs = (weights, k) if isinstance(k, Measure) else (weights,)
    held, passes = held_at_most(weights, n), usual_passes(weights, n)
    return Measure(inputs, lambda: rank_rounds(weights, n, ranks), passes=passes, holds=held)


class PerTensor(Number):
    """One measure for every tensor: a computation at a site is handed that tensor's number.

    Args:
        measures: by tensor.
        factor: see `Number`.

    >>> from calmerge import StateDict
    >>> weights = StateDict({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([2.0])})
    >>> norms = per_tensor(weights, lambda w: total(w, lambda x: x.abs().sum()))
    >>> weights.map(lambda w, norm, site: w / norm.float(), norms)["b"]
    tensor([1.])
    """

    def __init__(self, measures: Mapping[str, Measure], *, factor: bool = False) -> None:
        self.measures, self.factor = measures, factor
        self.inputs = tuple(measures.values())

    def at(self, site: Site) -> Tensor:
        """The number of the tensor at `site`."""
        number = self.measures[site.name].value()
        return number.contiguous() if self.factor else number


def per_tensor(weights: W, measure: Callable[[W], Measure], *, factor: bool = False) -> PerTensor:
    """`measure` of each tensor alone; see `PerTensor`."""
    return PerTensor({name: measure(weights.only_names([name])) for name in weights.specs}, factor=factor)


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
    threads, run = threads or os.cpu_count() or 1, run or Run()
    kept: Tapes = {}
    for stage in stages(nodes):
        sizes = [_entries(group) for group in stage]
        numel = sum(sizes)
        shared = [size * 4 * threads > numel for size in sizes]  # the others are worked on whole by one thread
        grids = [next((n for n in group[0].inputs if isinstance(n, Weights)), None) for group in stage]
        largest = grids[sizes.index(max(sizes))]
        taping = largest is not None and usable(numel, experts_in(largest))
        with workers(worthwhile(threads, numel, sum(len(grid) for grid in grids if grid is not None))) as pool:
            for group, by_blocks in zip(stage, shared, strict=True):
                if by_blocks:
                    _side_by_side(group, partial(ahead, pool, most=2 * threads), run, taping=taping, kept=kept)
            alone = [group for group, by_blocks in zip(stage, shared, strict=True) if not by_blocks]
            alone.sort(key=_entries, reverse=True)  # so that no thread is left with a large one at the end
            if alone:
                with run.progress.track("measuring", len(alone)) as bar:
                    for done in ahead(pool, partial(_in_turn, taping=taping, kept=kept), _batches(alone), 2 * threads):
                        bar.advance(done)


@kept_open()
def _in_turn(groups: Sequence[Sequence[Measure]], *, taping: bool, kept: Tapes) -> int:
    for group in groups:
        _side_by_side(group, map, Run(), taping=taping, kept=kept)
    return len(groups)


def _batches(groups: Iterable[list[Measure]]) -> Iterator[list[list[Measure]]]:
    """Groups of measures for one thread to find: one, or several of tensors of a few entries."""
    batch: list[list[Measure]] = []
    held = 0
    for group in groups:
        n = _entries(group)
        if batch and held + n > BLOCK:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += n
    if batch:
        yield batch


def _entries(group: Sequence[Measure]) -> int:
    return max((n.numel for n in group[0].inputs if isinstance(n, Weights)), default=0)


def stages(nodes: Iterable[Node]) -> list[list[list[Measure]]]:
    """The pending measures of `nodes`, in the order in which `settle` finds them.

    Those of one stage depend only on earlier stages; in it, those over the same blocks stand together and share passes.

    >>> from calmerge import StateDict
    >>> first = total(StateDict({"w": torch.ones(2)}), torch.sum)
    >>> [[len(group) for group in stage] for stage in stages([first.map(torch.sqrt), first])]
    [[1], [1]]
    """
    depths: dict[int, int] = {}
    grids: list[dict[object, list[Measure]]] = []

    def visit(node: Node) -> int:
        """The number of the first stage in which the node's value is known."""
        if id(node) in depths:
            return depths[id(node)]
        if isinstance(node, Measure) and node.settled:
            return 0
        depths[id(node)] = depth = max((visit(one) for one in node.inputs), default=0)
        if isinstance(node, Measure):
            if depth == len(grids):
                grids.append({})
            weights = [n for n in node.inputs if isinstance(n, Weights)]
            grid = (tuple(weights[0].specs.items()), all(w.elementwise for w in weights)) if weights else id(node)
            grids[depth].setdefault(grid, []).append(node)
            depths[id(node)] = depth + 1
        return depths[id(node)]

    for node in nodes:
        visit(node)
    return [list(groups.values()) for groups in grids]


def _side_by_side(group: Sequence[Measure], spread: Spread, run: Run, *, taping: bool, kept: Tapes) -> None:
    """Run the rounds of some measures in step: their first passes as one, then their second, and so on."""
    running: list[tuple[Measure, Generator[Pass | Sample, Any, Tensor], Any]] = [(m, m._rounds(), None) for m in group]
    while running:
        going: list[tuple[Measure, Generator[Pass | Sample, Any, Tensor], Pass]] = []
        for measure, rounds, found in running:
            try:
                one = rounds.send(found)
                while isinstance(one, Sample):
                    one = rounds.send(one.taken(taping=taping, kept=kept))
                going.append((measure, rounds, one))
            except StopIteration as done:
                measure._value = done.value
        work = [(measure.inputs, one) for measure, _, one in going]
        results = run_passes(work, spread, run, taping=taping, kept=kept) if going else []
        running = [(measure, rounds, found) for (measure, rounds, _), found in zip(going, results, strict=True)]
