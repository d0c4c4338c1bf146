"""Matrices whose rows are picked from other matrices."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calmerge._measure import Measure
from calmerge._watch import other_rows
from calmerge._weights import ALL, Memo, Spec, Weights, digest


class Rows:
    """By model, which of its rows goes into every row of the new matrix; -1 where none does.

    A row with several sources is their mean, one with none is zero.
    """

    def __init__(self, tables: Mapping[str, tuple[Weights, Tensor]]) -> None:
        self.tables = dict(tables)
        self.length = len(next(iter(tables.values()))[1])
        self._counts = sum(((rows >= 0).float() for _, rows in tables.values()), torch.zeros(self.length))

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of the tensor `name`."""
        result: Tensor | None = None
        for weights, table in self.tables.values():
            wanted = table[start:end]
            having = (wanted >= 0).nonzero()[:, 0]
            if not len(having):
                continue
            rows = _take(weights, name, wanted[having])
            if len(self.tables) == 1 and len(having) == end - start:
                return rows
            if result is None:
                result = torch.zeros(end - start, *rows.shape[1:], dtype=torch.promote_types(rows.dtype, torch.float32))
            result.index_add_(0, having, rows.to(result.dtype))
        if result is None:
            return torch.zeros(end - start, *next(iter(self.tables.values()))[0].specs[name].shape[1:])
        return result / self._counts[start:end].clamp(min=1).to(result.dtype).reshape(-1, *[1] * (result.dim() - 1))


class Rowed(Weights):
    """Weights in which some tensors are made of picked rows.

    Args:
        source: all other tensors.
        names: the tensors that are made anew.
        rows: of what.
        padding: how many rows there are in the end, and the row that fills up each tensor.
    """

    def __init__(
        self,
        source: Weights,
        names: Sequence[str],
        rows: Rows,
        *,
        padding: tuple[int, Mapping[str, Measure]] | None = None,
    ) -> None:
        self.source, self.rows, self._padding = source, rows, padding
        self.folder, self.edits = source.folder, source.edits
        self.inputs = (
            source, *(weights for weights, _ in rows.tables.values()), *(padding[1].values() if padding else ())
        )  # fmt: skip
        self._names = frozenset(names)
        length = padding[0] if padding else rows.length
        self.specs = {
            name: Spec((length, *spec.shape[1:]), spec.dtype) if name in self._names else spec
            for name, spec in source.specs.items()
        }
        self.elementwise = source.elementwise

    @property
    def fingerprint(self) -> str:
        """Changes when a source does, or when other rows are picked."""
        tables = [(w.fingerprint, digest(table.tolist())) for w, table in self.rows.tables.values()]
        return digest((self.source.fingerprint, sorted(self._names), tables, self._padding and self._padding[0]))

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The picked rows, in the type of the source; any other tensor as it is there."""
        if name not in self._names:
            return self.source.read(name, rows, memo)
        other_rows()
        spec = self.specs[name]
        start, end = (0, spec.shape[0]) if rows == ALL else (rows.start or 0, rows.stop)
        inside = min(end, self.rows.length)
        parts = [self.rows.read(name, start, inside).to(spec.dtype)] if start < inside else []
        if end > self.rows.length:
            assert self._padding is not None
            row = self._padding[1][name].value().to(spec.dtype)
            parts.append(row.expand(end - max(start, self.rows.length), *spec.shape[1:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _take(weights: Weights, name: str, index: Tensor) -> Tensor:
    """Some rows of a tensor, in the order of `index`; only the stretch that holds them is read."""
    low, high = int(index.min()), int(index.max()) + 1
    stretch = weights.read(name, slice(low, high))
    if torch.equal(index, torch.arange(low, high)):
        return stretch
    return stretch[index - low]
