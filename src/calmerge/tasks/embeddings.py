"""Embedding models: pairs of texts or other inputs, whose similarities are what is scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

from calmerge._errors import DataError


@dataclass(frozen=True)
class Pairs:
    """Queries with what they should be near to, as an indexable split.

    Args:
        query: encoded inputs, one a row: a tensor, or a mapping of tensors as tokenizers give.
        positive: of the same length.
        negatives: hard negatives of the same length, each row's own, or None.

    >>> pairs = Pairs(torch.eye(3), torch.eye(3))
    >>> len(pairs), pairs.batch(torch.tensor([2]))[0]["query"]
    (3, tensor([[0., 0., 1.]]))
    """

    query: Any
    positive: Any
    negatives: Any = None

    def __post_init__(self) -> None:
        parts = {name: part for name, part in vars(self).items() if part is not None}
        lengths = {name: _length(part) for name, part in parts.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(f"pairs: every query needs its positive and its negatives; found {lengths}.")

    def __len__(self) -> int:
        return _length(self.query)

    def batch(self, indices: Tensor) -> tuple[dict[str, Any], None]:
        """The pairs at `indices`; there are no labels."""
        parts = {"query": self.query, "positive": self.positive, "negatives": self.negatives}
        return {name: _at(part, indices) for name, part in parts.items() if part is not None}, None


def text_pairs(tokenizer: Any, rows: Sequence[Sequence[str]], *, max_tokens: int = 128) -> Pairs:
    """Pairs of texts, tokenized: each row is (query, positive) or (query, positive, hard negative).

    Args:
        tokenizer: of `transformers`, the experts' own; all must share it.
        rows: the texts, with what the experts' training put before them (instructions, prefixes).
        max_tokens: longer texts are cut.

    Raises:
        DataError: there are no rows, or rows of different kinds.
    """
    widths = {len(row) for row in rows}
    if widths not in ({2}, {3}):
        raise DataError(f"pairs: every row must be (query, positive) or (query, positive, negative); found {widths}.")
    columns = [
        dict(tokenizer(list(column), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"))
        for column in zip(*rows, strict=True)
    ]
    return Pairs(*columns)


class EmbeddingModel:
    """A sentence encoder scored by similarities: logits[i, j] = cos(query_i, candidate_j) / temperature.

    Candidates are the positives of the batch, in order, and after them its hard negatives, so that the right answer of
    query i is class i, and all other examples of the batch are its negatives.

    Args:
        module: from inputs to features; a tensor [n, d], or token states (`.last_hidden_state`) that `pool` reduces.
        temperature: as the experts were trained with, usually 0.01 to 0.05.
        pool: from token states [n, tokens, d] and the attention mask to [n, d]; the mean over tokens when None.

    >>> model = EmbeddingModel(nn.Linear(2, 2, bias=False), temperature=0.5)
    >>> batch = {"query": torch.eye(2), "positive": torch.eye(2)}
    >>> model.logits({"weight": torch.eye(2)}, batch, "sts")
    tensor([[2., 0.],
            [0., 2.]])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        temperature: float = 0.05,
        pool: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.temperature, self._pool = temperature, pool or mean_pool
        self.names = {name: name for name in self.module.state_dict()}

    def logits(self, weights: Mapping[str, Tensor], inputs: Mapping[str, Any], task: str) -> Tensor:
        """Similarities of every query with every candidate of the batch, over the temperature."""
        query = self.embed(weights, inputs["query"])
        candidates = [self.embed(weights, inputs[part]) for part in ("positive", "negatives") if part in inputs]
        return query @ torch.cat(candidates).T / self.temperature

    def embed(self, weights: Mapping[str, Tensor], inputs: Any) -> Tensor:
        """Embeddings of length 1: [n, d]."""
        known = {name: w for name, w in weights.items() if name in self.names}
        if weights and not known:
            raise DataError(
                f"the encoder has none of the merged tensors: they are named '{next(iter(weights))}', its own "
                f"'{next(iter(self.names), '(none)')}'."
            )
        if not isinstance(inputs, Mapping):
            return normalize(functional_call(self.module, known, (inputs,)), dim=-1)
        output = functional_call(self.module, known, (), dict(inputs))
        states = getattr(output, "last_hidden_state", output)
        return normalize(self._pool(states, inputs["attention_mask"]), dim=-1)


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens that are no padding: [n, tokens, d] to [n, d].

    >>> mean_pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[2.]])
    """
    weights = mask[..., None].to(states)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """The state of the first token ([CLS]): [n, tokens, d] to [n, d].

    >>> first_token(torch.tensor([[[1.0], [3.0]]]), torch.ones(1, 2))
    tensor([[1.]])
    """
    return states[:, 0]


def _length(part: Any) -> int:
    return len(next(iter(part.values()))) if isinstance(part, Mapping) else len(part)


def _at(part: Any, indices: Tensor) -> Any:
    return {name: x[indices] for name, x in part.items()} if isinstance(part, Mapping) else part[indices]
