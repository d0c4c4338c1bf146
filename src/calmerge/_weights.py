"""Named tensors that are read, or computed, when asked for: never all at once."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from calmerge._watch import Array, Fill, computed, handed, leaf

ALL = slice(None)
BLOCK = 2**17  # entries that are worked on at a time; those of a number over a model always are
Memo = dict[tuple[int, str, int | None, int | None], Tensor]


class Spec(NamedTuple):
    """Shape and stored type of one tensor, as its header says."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many entries the tensor has."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """How many bytes it takes where it is stored."""
        return self.numel * self.dtype.itemsize


class Site(NamedTuple):
    """Where in a model a piece is working: the tensor, and the index of the first entry it was handed."""

    name: str
    offset: int


class Node:
    """Anything a lazy computation depends on: weights, or a number measured over weights.

    Attributes:
        inputs: the nodes it is computed from itself.
    """

    inputs: "tuple[Node, ...]" = ()


class Number(Node):
    """A node that hands a computation one small tensor, whatever block it is at.

    Attributes:
        factor: whether computations only take it for an operand between all entries, and never look at it, so that a
            tape serves for every value.
    """

    factor: bool = False

    def at(self, site: Site) -> Tensor:
        """The tensor for a computation at `site`."""
        raise NotImplementedError


class Weights(Node, Mapping[str, Tensor]):
    """A lazy mapping from names to tensors.

    `weights[name]` reads one whole tensor, `read(name, rows)` some rows of one. Only `specs` is known before that.

    Attributes:
        specs: shape and dtype by name.
        elementwise: whether rows can be had without reading the whole tensor.
        folder: where they were opened, if that is a folder with side files (configuration, tokenizer).
        edits: side files that differ from those in the folder: their content, or None for one that is left out.
    """

    specs: Mapping[str, Spec]
    elementwise: bool = True
    _uncut: "Weights | None" = None
    folder: Path | None = None
    edits: Mapping[str, bytes | None] = MappingProxyType({})

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The tensor `name`, or its `rows` along the first dimension.

        Args:
            name: one of `specs`.
            rows: a slice with step 1; a tensor without dimensions is only read whole.
            memo: shared by the nodes of one graph while one block is computed, so that no input is read twice.
        """
        raise NotImplementedError

    def whole(self, name: str) -> bool:
        """Whether rows of this tensor cannot be had without reading all of it.

        >>> StateDict({"w": torch.zeros(2)}).whole("w")
        False
        """
        return not self.elementwise

    def parts(self, name: str) -> Sequence[Node] | None:
        """What a tensor is made of, if all that tells how are these nodes, its spec and theirs.

        Then tensors of which this is the same are treated alike. None where it is not so, or a part has another name.

        >>> StateDict({"w": torch.zeros(2)}).parts("w")
        ()
        """
        return None

    def map(
        self, fn: Callable[..., Tensor], *others: Node, elementwise: bool = True, copies: int | None = None
    ) -> "Weights":
        """The weights with `fn(tensor, *others, site)` applied to every tensor when it is read.

        Args:
            fn: may be called on some rows of a tensor at a time.
            others: weights of the same names, or measures, whose blocks or numbers `fn` is handed too.
            elementwise: whether `fn` of some rows equals some rows of `fn`; if not, it gets whole tensors only.
            copies: see `Computed`.

        >>> doubled = StateDict({"w": torch.tensor([1.0, 2.0])}).map(lambda w, site: 2 * w)
        >>> doubled["w"]
        tensor([2., 4.])
        """
        return Computed(fn, (self, *others), self.specs, elementwise=elementwise, copies=copies)

    def only_names(self, names: Iterable[str]) -> Self:
        """Some of the tensors, in the order given.

        >>> list(StateDict({"a": torch.zeros(1), "b": torch.zeros(1)}).only_names(["b"]))
        ['b']
        """
        chosen = object.__new__(type(self))  # as copy.copy does, in a tenth of the time
        chosen.__dict__ |= self.__dict__
        chosen._uncut = self.uncut
        chosen.specs = {name: self.specs[name] for name in names}
        return chosen

    @property
    def uncut(self) -> "Weights":
        """The weights from which `only_names` chose these."""
        return self if self._uncut is None else self._uncut

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # the mapping's own way would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def numel(self) -> int:
        """How many entries all tensors have together."""
        return sum(spec.numel for spec in self.specs.values())

    @property
    def nbytes(self) -> int:
        """How many bytes all tensors take where they are stored."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def fingerprint(self) -> str:
        """Changes when the weights do, as far as that can be told without reading them."""
        return digest(sorted(self.specs.items()))


class StateDict(Weights):
    """Tensors held in memory.

    >>> weights = StateDict({"w": torch.zeros(2, 3)})
    >>> weights.specs["w"].shape, weights.read("w", slice(0, 1)).shape
    ((2, 3), torch.Size([1, 3]))
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The tensor itself, or a view of some of its rows."""
        tensor = self._tensors[name]
        found = tensor if rows == ALL else tensor[rows]
        return leaf(found, site_of(self, name, rows).offset, _Held(self._tensors, name))

    def parts(self, name: str) -> Sequence[Node]:
        """None: it is there."""
        return ()

    @property
    def fingerprint(self) -> str:
        """A digest of up to 64 entries of every tensor."""
        some = {n: t.detach().flatten()[:: max(1, t.numel() // 64)].tolist() for n, t in self._tensors.items()}
        return digest(sorted(some.items()))


@dataclass(frozen=True)
class _Held:
    """How a tape reads a tensor that is held."""

    tensors: Mapping[str, Tensor]
    name: str

    def __call__(self, rows: slice, offset: int, into: Array) -> Array:
        return self.tensors[self.name][rows].detach().contiguous().view(-1).view(torch.uint8).numpy()

    def of(self, name: str) -> "_Held":
        return _Held(self.tensors, name)


class Computed(Weights):
    """What `fn` makes of the tensors of the same name in `inputs`; nothing is kept.

    Args:
        fn: called as `fn(*tensors, site)`.
        inputs: weights that know every name of `specs`, and measures.
        specs: the names, shapes and types that come out.
        elementwise: whether `fn` of some rows equals some rows of `fn`.
        copies: how many float32 tensors of one expert's shape `fn` holds at most, beside what it is handed and what it
            returns; two more than it is handed when None. A plan tells peak memory from it.
        row_dim: the dimension of the result along which rows are counted (1 for stacks of task vectors).
    """

    row_dim = 0

    def __init__(
        self,
        fn: Callable[..., Tensor],
        inputs: tuple[Node, ...],
        specs: Mapping[str, Spec],
        *,
        elementwise: bool = True,
        copies: int | None = None,
    ) -> None:
        self._fn, self.inputs, self._own, self.copies = fn, inputs, elementwise, copies
        self.specs = specs
        mixed = [w for w in inputs if isinstance(w, Weights) and not w.elementwise]
        self._whole = frozenset(n for w in mixed for n in specs if n in w.specs and w.whole(n))
        self.elementwise = elementwise and not mixed

    def whole(self, name: str) -> bool:
        """Whether `fn`, or an input, needs this tensor whole."""
        return not self._own or name in self._whole

    def parts(self, name: str) -> Sequence[Node]:
        """Its inputs; whether `fn` looks at the site is seen when it is called."""
        return self.inputs

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The computed tensor; an earlier result for the same block in `memo` is used again."""
        memo = {} if memo is None else memo
        key = (id(self), name, rows.start, rows.stop)
        if key not in memo:
            if rows != ALL and not self._own:
                memo[key] = self.read(name, ALL, memo)[(slice(None),) * self.row_dim + (rows,)]
            else:
                site, known = site_of(self, name, rows), memo

                def values() -> list[Tensor]:
                    return [value_at(node, site, rows, known) for node in self.inputs]

                memo[key] = computed(self._fn, values, site, lambda: self._again(name))
        return memo[key]

    def _again(self, name: str) -> Fill:
        from calmerge._reader import Remade  # which reads weights

        return Remade(self._fn, self.inputs, name)


class Gathered(Weights):
    """Tensors from several places under new names, each read from its own when asked for.

    Args:
        places: by new name, the weights it comes from and its name there.

    >>> source = StateDict({"w": torch.ones(1)})
    >>> Gathered({"bert.w": (source, "w")})["bert.w"]
    tensor([1.])
    """

    def __init__(self, places: Mapping[str, tuple[Weights, str]]) -> None:
        self.places = dict(places)
        sources = {id(source): source for source, _ in places.values()}
        self.inputs = tuple(sources.values())
        self.specs = {own: source.specs[name] for own, (source, name) in places.items()}
        self.elementwise = all(source.elementwise for source in sources.values())

    @property
    def fingerprint(self) -> str:
        """Changes when a source does, or when a tensor comes from elsewhere."""
        prints = {id(source): source.fingerprint for source, _ in self.places.values()}
        return digest([(own, prints[id(source)], theirs) for own, (source, theirs) in self.places.items()])

    def whole(self, name: str) -> bool:
        """Whether the tensor must be read whole where it comes from."""
        source, theirs = self.places[name]
        return source.whole(theirs)

    def parts(self, name: str) -> Sequence[Node] | None:
        """The one source of this tensor, where it has the same name there."""
        source, theirs = self.places[name]
        return (source,) if theirs == name else None

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The tensor where it comes from."""
        source, theirs = self.places[name]
        return source.read(theirs, rows, memo)


def digest(content: object) -> str:
    """A short hash of what `repr` shows of `content`."""
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


def row_size(spec: Spec) -> int:
    """How many entries one row has; a tensor without dimensions is one row.

    >>> row_size(Spec((4, 3, 2), torch.float32)), row_size(Spec((), torch.float32))
    (6, 1)
    """
    return torch.Size(spec.shape[1:]).numel()


def site_of(weights: Weights, name: str, rows: slice) -> Site:
    """Where the `rows` of a tensor are."""
    return Site(name, (rows.start or 0) * row_size(weights.specs[name]))


def entries(weights: Weights, name: str, rows: slice) -> int:
    """How many entries the `rows` of a tensor have."""
    spec = weights.specs[name]
    return spec.numel if rows == ALL else (rows.stop - (rows.start or 0)) * row_size(spec)


def value_at(node: Node, site: Site, rows: slice, memo: Memo) -> Tensor:
    """What a computation on `rows` of a tensor is handed of one of its inputs: these rows, or a number."""
    if isinstance(node, Weights):
        return node.read(site.name, rows, memo)
    assert isinstance(node, Number)
    return handed(node, node.at(site)) if node.factor else node.at(site)


def blocks(weights: Weights, size: int = BLOCK) -> Iterator[tuple[str, slice]]:
    """Name and rows of pieces of about `size` entries that cover `weights` once, in order.

    A row is never split, and a tensor that cannot be read by rows comes whole. Where more than four experts go into
    the weights, pieces are smaller, so that memory stays what it is and they stay in cache.

    >>> list(blocks(StateDict({"a": torch.zeros(5, 2), "b": torch.zeros(())}), size=4))
    [('a', slice(0, 2, None)), ('a', slice(2, 4, None)), ('a', slice(4, 5, None)), ('b', slice(None, None, None))]
    """
    size = size * 4 // max(4, experts_in(weights))
    for name, spec in weights.specs.items():
        step = max(1, size // max(1, row_size(spec)))
        if not spec.shape or weights.whole(name) or step >= spec.shape[0]:
            yield name, ALL
        else:
            for start in range(0, spec.shape[0], step):
                yield name, slice(start, min(start + step, spec.shape[0]))


def joined(rows: Sequence[slice]) -> slice:
    """Blocks of rows that follow each other, as one.

    >>> joined([slice(0, 2), slice(2, 3)])
    slice(0, 3, None)
    """
    return rows[0] if len(rows) == 1 else slice(rows[0].start, rows[-1].stop)


Stretch = list[tuple[str, list[slice]]]
"""Blocks that one thread works on: names of tensors, and rows of each."""


def stretches(weights: Weights, size: int = BLOCK, most: int = 8) -> Iterator[Stretch]:
    """The `blocks` of `weights`, up to `most` neighbours of one tensor at a time, or several tensors of a few entries.

    >>> weights = StateDict({"a": torch.zeros(5, 2), "b": torch.zeros(1), "c": torch.zeros(())})
    >>> [[(name, len(rows)) for name, rows in stretch] for stretch in stretches(weights, 4, most=2)]
    [[('a', 2)], [('a', 1), ('b', 1), ('c', 1)]]
    """
    batch: Stretch = []
    held = 0
    for name, found in groupby(blocks(weights, size), key=itemgetter(0)):
        rows = [one for _, one in found]
        for i in range(0, len(rows), most):
            n = entries(weights, name, joined(rows[i : i + most]))
            if batch and held + n > size:
                yield batch
                batch, held = [], 0
            batch.append((name, rows[i : i + most]))
            held += n
    if batch:
        yield batch


def experts_in(weights: Weights) -> int:
    """The most experts of which a block is held while one of `weights` is computed; 1 where there are none.

    >>> experts_in(StateDict({"w": torch.zeros(1)}))
    1
    """
    most, seen, waiting = 1, {id(weights)}, [weights]
    while waiting:
        one = waiting.pop()
        most = max(most, len(getattr(one, "tasks", ())))
        for node in one.inputs:
            if isinstance(node, Weights) and id(node) not in seen:
                seen.add(id(node))
                waiting.append(node)
    return most


def add(base: Weights, delta: Weights, *, dtype: torch.dtype | None = None) -> Weights:
    """`base + delta` in float32, cast once; where there is no delta, or it is 0, the base's bits.

    Args:
        base: all tensors of the model.
        delta: the merged ones.
        dtype: floating type of the result; the base's own when None.

    >>> base = StateDict({"w": torch.tensor([1.0, -0.0]), "steps": torch.tensor(3)})
    >>> dict(add(base, StateDict({"w": torch.tensor([0.5, 0.0])})))
    {'w': tensor([1.5000, -0.0000]), 'steps': tensor(3)}
    """
    specs = {
        name: Spec(spec.shape, dtype) if dtype and spec.dtype.is_floating_point else spec
        for name, spec in base.specs.items()
    }
    return _Sum(base, delta, specs)


class _Sum(Weights):
    def __init__(self, base: Weights, delta: Weights, specs: Mapping[str, Spec]) -> None:
        self._base, self._delta, self.specs = base, delta, specs
        self.inputs = (base, delta)
        self.elementwise = base.elementwise and delta.elementwise

    def whole(self, name: str) -> bool:
        return self._base.whole(name) or (name in self._delta.specs and self._delta.whole(name))

    def parts(self, name: str) -> Sequence[Node]:
        return (self._base, self._delta) if name in self._delta.specs else (self._base,)

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        memo = {} if memo is None else memo
        base = self._base.read(name, rows, memo)
        dtype = self.specs[name].dtype
        if name not in self._delta.specs:
            return base.to(dtype)
        wide = base.to(torch.promote_types(base.dtype, torch.float32))
        # x - (0 - d) is x + d, but where d is 0 or -0 it is x to the bit, also for x = -0
        return (wide - (0.0 - self._delta.read(name, rows, memo))).to(dtype)
