"""What computing and writing weights takes, from headers alone: passes, bytes, memory, and how to stay below a limit.

A plan has two parts, and any executor that keeps their order gives the same bytes. First the stages: groups of
measures, each of which is a sum of partial results over blocks. Then the files: tensors that depend on no other now.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import chain

from calmerge._compiled import usable
from calmerge._errors import UsageError
from calmerge._lora import Adapted
from calmerge._measure import Measure, stages
from calmerge._memory import private_memory
from calmerge._passes import TOGETHER
from calmerge._reader import HELD
from calmerge._size import bytes_of, shown
from calmerge._task_vectors import TaskVectors
from calmerge._weights import BLOCK, Computed, Gathered, Node, Weights, blocks, entries
from calmerge._writer import shards

_FLOAT = 4  # bytes of an entry while it is worked on
_COUNTING = 8  # copies of what it is handed that a pass of a measure holds at most
_ADDING = 6  # copies of a tensor that reading it, or adding base and delta and casting, hold at most
_SMALLEST = 2**14  # entries of a chunk; with fewer, calls cost more than the work
_KEPT = 32 * 10**6  # bytes of an allocation up to which the allocator keeps freed memory for later
_MOST_THREADS = 256


@dataclass(frozen=True)
class Plan:
    """How weights are going to be computed and written.

    Attributes:
        stages: groups of measures; a stage waits for the one before, the groups of one stage do not.
        files: the tensors of every file, each of which can be written alone once the measures are known; one mapping
            for each of the weights.
        kind: `A` (entries alone) or `B` (whole tensors), and `C` for numbers over the model first: A, B, C, B+C.
        passes: how often the inputs are read, the writing included.
        reads: bytes that these passes read.
        writes: bytes of tensors that come out.
        threads: blocks worked on at a time.
        chunk: entries of a block, where rows can be had alone.
        memory: bytes held at most, beside what the process holds already.
    """

    stages: list[list[list[Measure]]]
    files: list[dict[str, list[str]]]
    kind: str
    passes: int
    reads: int
    writes: int
    threads: int
    chunk: int
    memory: int


def plan(
    *weights: Weights | Sequence[Weights],
    shard: str | int = "5GB",
    chunk: int = BLOCK,
    threads: int | None = None,
    max_memory: str | int | None = None,
) -> Plan:
    """What writing these weights, one after the other, will take.

    Args:
        weights: what is to be written; not one tensor is read. Several in a list are written side by side, block by
            block, and read their inputs once.
        shard: the most bytes that one file holds.
        chunk: entries computed at a time, at most.
        threads: blocks computed at a time, at most; as many as there are cores when None.
        max_memory: private memory that the process may take, like "2GB"; smaller chunks and fewer threads keep it.

    Raises:
        UsageError: `max_memory` is too little, with what is needed.

    >>> from calmerge import StateDict, task_vectors, ties
    >>> tvs = task_vectors({"w": torch.zeros(100)}, {"a": {"w": torch.ones(100)}})
    >>> found = plan(ties(tvs, keep=0.1))
    >>> found.kind, found.passes, found.reads
    ('C', 3, 2400)
    """
    threads = min(threads or os.cpu_count() or 1, _MOST_THREADS)
    parts = [[part] if isinstance(part, Weights) else list(part) for part in weights]
    outputs = [one for part in parts for one in part]
    steps = [[group for group in stage if _passes(group)] for stage in stages(outputs)]
    groups = [group for stage in steps for group in stage]
    inputs = sum(_bytes_read(part, part[0].specs) for part in parts)
    threads, chunk, memory = _settings(parts, steps, threads, chunk, max_memory)
    whole = any(not one.elementwise for one in outputs)
    return Plan(
        stages=steps,
        files=[shards(one, bytes_of(shard)) for one in outputs],
        kind="+".join((["B"] if whole else []) + (["C"] if groups else [])) or "A",
        passes=sum(max(map(_passes, stage), default=0) for stage in steps) + len(parts),
        reads=inputs + sum(_passes(group) * _bytes_read(*_over(group)) for group in groups),
        writes=sum(one.nbytes for one in outputs),
        threads=threads,
        chunk=chunk,
        memory=memory,
    )


# Memory --------------------------------------------------------------------------------------------------------


def _settings(
    parts: Sequence[Sequence[Weights]],
    steps: Sequence[list[list[Measure]]],
    threads: int,
    chunk: int,
    max_memory: str | int | None,
) -> tuple[int, int, int]:
    """The most threads, and then the largest chunk, that stay within the limit; and the memory that they take."""
    counting = [  # the groups of one stage are worked on side by side
        nlargest(_MOST_THREADS, chain.from_iterable(map(_measured, nlargest(_MOST_THREADS, stage, key=_weight))))
        for stage in steps
    ]

    def memory(threads: int, chunk: int) -> int:
        return max(sum(s[:threads]) for s in [*counting, *(_block_sizes(part, part[0], chunk) for part in parts)])

    if max_memory is None:
        return threads, chunk, memory(threads, chunk)
    present = private_memory() or 0
    limit = bytes_of(max_memory, "max_memory") - present
    chunks = [chunk]
    while chunks[-1] > _SMALLEST and any(part[0].elementwise for part in parts):
        chunks.append(max(_SMALLEST, chunks[-1] // 4))
    for n in range(threads, 0, -1):
        for size in chunks:
            if (found := memory(n, size)) <= limit:
                return n, size, found
    raise UsageError(
        f"max_memory: this merge needs {shown(present + memory(1, chunks[-1]))}, got {max_memory}. "
        f"{shown(present)} are taken before it begins; {_why(parts)}. Allow as much, or use another method."
    )


def _why(parts: Sequence[Sequence[Weights]]) -> str:
    whole = next((one for part in parts for one in part if not one.elementwise), None)
    if whole is None:
        return "numbers over the model are found in blocks of one size, so that they never depend on the limit"
    held = _Held([whole], whole)
    name = max(filter(whole.whole, whole.specs), key=lambda name: held.bytes(name, whole.specs[name].numel))
    n = whole.specs[name].numel
    return (
        f"it works on whole tensors, and holds {held.bytes(name, n) / (n * _FLOAT):.0f} float32 copies of the largest, "
        f"'{name}'"
    )


def _weight(group: Sequence[Measure]) -> int:
    """What tells which groups of measures may take the most."""
    return _FLOAT * _over(group)[1].numel + sum(measure.holds for measure in group)


def _measured(group: Sequence[Measure]) -> list[int]:
    """As `_block_sizes`, of a group of measures; on the first falls what their passes hold beside their blocks."""
    nodes, grid = _over(group)
    sizes = _block_sizes(nodes, grid, BLOCK)
    planes = sum(_width(one) for measure in group for one in measure.inputs if isinstance(one, Weights))
    if usable(grid.numel, planes):  # a tape gives several blocks as one
        n = min(TOGETHER * BLOCK, max(spec.numel for spec in grid.specs.values()))
        sizes = [max(size, planes * n * _FLOAT) for size in sizes]
    return [sizes[0] + sum(measure.holds for measure in group), *sizes[1:]] if sizes else sizes


def _block_sizes(nodes: Iterable[Node], grid: Weights, chunk: int) -> list[int]:
    """Bytes held for each of the blocks that take the most, in falling order: as many as there may be threads."""
    held = _Held(nodes, grid)
    counts = Counter((name, entries(grid, name, rows)) for name, rows in blocks(grid, chunk))
    if grid.elementwise:
        most = max((held.bytes(*block) for block in counts), default=0)
        if usable(grid.numel, held.width):  # a tape is handed several blocks as one
            n = min(HELD * chunk, max(spec.numel for spec in grid.specs.values()))
            most = max(most, held.bytes_of_a_call(n))
        return [most] * min(_MOST_THREADS, counts.total())
    found = [size for block, n in counts.items() for size in [held.bytes(*block)] * min(n, _MOST_THREADS)]
    return sorted(found, reverse=True)[:_MOST_THREADS]


class _Held:
    """What is held while one block is computed: every result on the way to it, and one function's own on top.

    Args:
        nodes: what is computed.
        grid: has the names of the blocks.
    """

    def __init__(self, nodes: Iterable[Node], grid: Weights) -> None:
        self._names = grid.specs
        self._seen: set[int] = set()
        self._always: list[tuple[int, int]] = []
        self._of = defaultdict[str, list[tuple[int, int]]](list)  # by tensor
        self.width = self._call = 1
        for node in nodes:
            self._visit(node, outer=True)

    def bytes(self, name: str, n: int) -> int:
        """For a block of `n` entries."""
        parts = [*self._always, *self._of[name]]
        copies = sum(kept for kept, _ in parts) + max(passing for _, passing in parts)
        return copies * n * _FLOAT * self._slack(n)

    def bytes_of_a_call(self, n: int) -> int:
        """For a block of `n` entries, where one function's inputs, its own, and what it returns are held at a time."""
        return self._call * n * _FLOAT * self._slack(n)

    def _slack(self, n: int) -> int:
        return 2 if n * _FLOAT * self.width <= _KEPT else 1

    def _visit(self, node: Node, outer: bool) -> None:
        """A node's float32 copies of a block: what it keeps until the block is done, and what comes and goes."""
        if id(node) in self._seen:
            return
        into = max((_width(n) for n in node.inputs), default=1)
        self.width = max(self.width, into)
        if isinstance(node, Weights):
            if isinstance(node, Computed):
                found = _width(node), into + 2 if node.copies is None else node.copies
                self._call = max(self._call, into + sum(found))
            else:  # task vectors hand on what they are given
                found = (0, 0) if isinstance(node, TaskVectors) else (_width(node), _ADDING)
            for name in _common(node.specs, self._names):
                self._of[name].append(found)
        elif outer:
            self._always.append((0, _COUNTING * into))
        else:
            return  # a measure is known by now
        self._seen.add(id(node))
        for one in node.inputs:
            self._visit(one, outer=False)


def _common(some: Mapping[str, object], others: Mapping[str, object]) -> Iterator[str]:
    """The names in both, found in the time that the fewer take."""
    fewer, more = sorted((some, others), key=len)
    return (name for name in fewer if name in more)


def _width(node: Node) -> int:
    """How many tensors a node hands on of each name: T for task vectors, 1 for weights."""
    if isinstance(node, TaskVectors):
        return len(node.tasks)
    if getattr(node, "row_dim", 0) == 0:
        return 1
    own = len(getattr(node, "experts", ()))
    return own or max((_width(n) for n in node.inputs), default=1)


# Bytes ---------------------------------------------------------------------------------------------------------


def _passes(group: Iterable[Measure]) -> int:
    return max(measure.passes for measure in group)


def _over(group: Iterable[Measure]) -> tuple[list[Node], Weights]:
    """What a group of measures reads, and weights of the names over which it goes."""
    measures: list[Node] = [m for m in group if m.passes]
    inputs = [n for m in measures for n in m.inputs if isinstance(n, Weights)]
    return measures, next((w for w in inputs if not w.elementwise), inputs[0])


def _bytes_read(nodes: Iterable[Node], names: Iterable[str]) -> int:
    """Stored bytes of the inputs that computing these names reads, each once."""
    found: dict[tuple[int, str], int] = {}
    seen: set[tuple[int, str]] = set()

    def visit(node: Node, asked: Mapping[str, object]) -> None:
        if not isinstance(node, Weights):
            return
        names = [name for name in _common(asked, node.specs) if (id(node), name) not in seen]
        seen.update((id(node), name) for name in names)
        own: Mapping[str, str] = getattr(node, "names", {})  # of a source under other names
        if isinstance(node, Gathered):
            wanted_of = defaultdict[int, dict[str, None]](dict)
            for place in map(node.places.__getitem__, names):
                wanted_of[id(place[0])][place[1]] = None
            for source in node.inputs:
                visit(source, wanted_of[id(source)])
        elif isinstance(node, Adapted):
            visit(node.base, dict.fromkeys(names))
            visit(node.source, dict.fromkeys(node.stored(names)))
        elif node.inputs:
            wanted = dict.fromkeys(own.get(name, name) for name in names)
            for one in node.inputs:
                visit(one, wanted)
        else:
            found.update({(id(node), name): node.specs[name].nbytes for name in names})

    for node in nodes:
        for one in node.inputs if isinstance(node, Measure) else [node]:
            visit(one, dict.fromkeys(names))
    return sum(found.values())
