"""Passes over weights: every block is worked on by some thread, and the partial results are put together in order.

This is the seam at which another executor (processes, Ray) would be put: `run_passes` is a map over blocks, `part`,
followed by a reduction of what came back, `add`, in the order of the blocks. Parts are arrays and tensors, numbers for
the most part, so that they can travel; `part` needs the lazy weights, which are opened from headers anywhere.
"""

import gc
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from calmerge._compiled import ByStrips
from calmerge._handles import kept_open
from calmerge._reader import Reader, Tapes
from calmerge._run import Run
from calmerge._weights import Node, Stretch, Weights, entries, joined, site_of, stretches

TOGETHER = 8
"""Blocks that may come as one: of T tasks that are 4 T MB, less than torch takes for one block."""
_TINY = 2**13  # entries of a tensor that take less time than the Python around them
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Fold:
    """A pass whose partial results are put together by `add`; what comes out must not depend on the blocks' size.

    Args:
        part: from the blocks of a measure's inputs (and its settled measures) and their `Site` to a partial result.
        add: from what was put together so far (None at the beginning) and the next partial result to both together.
        rounded: whether parts are rounded, so that blocks must always be the same ones.
        strips: gives a compiled loop that makes the same as `part`, where there is one and the machine of tapes for it.
    """

    part: Callable[..., Any]
    add: Callable[[Any, Any], Any]
    rounded: bool = False
    strips: Callable[[], ByStrips | None] = lambda: None


@dataclass(frozen=True)
class Sample:
    """Not a pass, but a look at some blocks, for a guess.

    Args:
        weights: that are looked at.
        places: name of a tensor, its rows and how many of their entries count, those of a tensor side by side.
        part: from a block and that number to a result.
    """

    weights: Weights
    places: Sequence[tuple[str, slice, int]]
    part: Callable[[Tensor, int], Any]

    def taken(self, *, taping: bool | None = None, kept: Tapes | None = None) -> list[Any]:
        """What `part` makes of every block; `taping` and `kept` are those of a `Reader`."""
        reader, found = Reader([self.weights], taping=taping, kept=kept), []
        for name, some in itertools.groupby(self.places, key=itemgetter(0)):
            _, rows, most = zip(*some, strict=True)
            blocks = reader.windows(name, rows, most) or (block for _, (block,) in reader.each(name, rows))
            found += [self.part(block, n) for block, n in zip(blocks, most, strict=True)]
        return found


Pass = Callable[..., Tensor] | Fold
"""A fold, or a function from blocks and their `Site` to partial sums of one shape, which are added and may be rounded.
"""


class Spread(Protocol):
    """A map: `fn` of every item, in order."""

    def __call__(self, fn: Callable[[A], B], items: Iterable[A], /) -> Iterable[B]:
        """`fn` of every item, in order."""


def run_passes(
    work: Sequence[tuple[Sequence[Node], Pass]], spread: Spread, run: Run,
    *, taping: bool | None = None, kept: Tapes | None = None,
) -> list[Any]:  # fmt: skip
    """What every pass makes of its inputs; all have the same names, and every block is read once for all of them.

    Args:
        work: the inputs of each pass, and the pass.
        spread: how blocks are shared out.
        run: progress in entries.
        taping: whether tapes are worth while, as they are for small weights too where there are many; see `Reader`.
        kept: tapes, as for a `Reader`.
    """
    inputs = [n for nodes, _ in work for n in nodes if isinstance(n, Weights)]
    weights = next((w for w in inputs if not w.elementwise), inputs[0])
    folds = [one if isinstance(one, Fold) else Fold(one, added, rounded=True) for _, one in work]
    by_block = any(fold.rounded for fold in folds)
    reader = Reader([node for nodes, _ in work for node in nodes], taping=taping, kept=kept)

    def of(name: str, rows: slice, tensors: Iterable[Tensor]) -> list[Any]:
        """What each pass makes of a block."""
        site, values = site_of(weights, name, rows), iter(tensors)
        return [
            fold.part(*itertools.islice(values, len(nodes)), site)
            for (nodes, _), fold in zip(work, folds, strict=True)
        ]  # fmt: skip

    def each(name: str, blocks: Sequence[slice]) -> Iterator[tuple[slice, list[Any]]]:
        """The same of several blocks, with the rows of each or of some together."""
        loop = folds[0].strips() if len(folds) == 1 else None
        made = loop and reader.by_strips(name, blocks, loop, together=TOGETHER)
        if made:
            for some, part in made:
                if part is None:  # not sound: torch tells what is wrong, or goes on where it was a sum that overflowed
                    yield from ((rows, of(name, rows, reader.read(name, rows))) for rows in some)
                else:
                    yield joined(some), [part]
            return
        read = reader.each(name, blocks, together=TOGETHER)
        for rows, tensors in reader.cut(read, blocks) if by_block else read:
            yield rows, of(name, rows, tensors)

    @kept_open()
    def parts(stretch: Stretch) -> tuple[int, list[list[Any]]]:
        found = [(entries(weights, name, rows), one) for name, blocks in stretch for rows, one in each(name, blocks)]
        return sum(n for n, _ in found), [one for _, one in found]

    results: list[Any] = [None] * len(work)
    with run.progress.track("measuring", weights.numel, "entry") as bar:
        for n, blocks in spread(parts, stretches(weights)):
            for found in blocks:
                results = [fold.add(old, part) for fold, old, part in zip(folds, results, found, strict=True)]
            bar.advance(n)
    return [torch.zeros((), dtype=torch.float64) if found is None else found for found in results]


def added(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum of partial sums."""
    part = part.cpu()
    return part if total is None else total + part


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


def worthwhile(threads: int, entries: int, tensors: int) -> int:
    """How many threads gain time: where tensors are tiny, one, since the others would wait for its Python.

    >>> worthwhile(8, 10**9, 300), worthwhile(8, 10**6, 4000)
    (8, 1)
    """
    return threads if entries >= _TINY * tensors else 1


class _YoungGarbageAlone:
    """In it Python does not look for garbage among all that imports made, which takes a tenth of a second.

    That is a setting of the process: the first that enters changes it, the last that leaves puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._usual = threading.Lock(), 0, gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = gc.get_threshold()
                gc.set_threshold(*self._usual[:2], 2**30)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                gc.set_threshold(*self._usual)


_YOUNG_GARBAGE_ALONE = _YoungGarbageAlone()


@contextmanager
def workers(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute with one torch thread each: blocks are the parallelism.

    The thread that opens them has one as well until they are closed. BLAS has one number for all threads, and others
    that are opened meanwhile put back what they found: the number of this one.

    >>> with workers(2) as pool:
    ...     list(pool.map(abs, [-1, 2]))
    [1, 2]
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    # glibc gives freed blocks back to the system, which clears them anew each time (a third of a merge's time), unless
    # they are smaller than the largest one it was ever seen to free, up to 32 MB: so it is shown one
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    try:
        with (
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
            _YOUNG_GARBAGE_ALONE,
        ):
            yield pool
    finally:
        torch.set_num_threads(before)
