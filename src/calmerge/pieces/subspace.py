"""A router without training: every token of every linear layer goes to the experts whose input directions it fits."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calmerge._errors import DataError
from calmerge._merged import Merged
from calmerge._weights import StateDict, Weights, add
from calmerge.pieces.factor_patch import LEFT, RIGHT, WHOLE, FactorPatch
from calmerge.tasks.base import Model, Outputs, told
from calmerge.tasks.taps import OpenModel, is_transposed, linear_layers, shown

CPU = torch.device("cpu")


@dataclass(frozen=True)
class SubspaceRouter:
    """softmax over tasks of how long a token is within the leading input directions of each expert's update.

    Its directions are those of the patches' factors, so that it stores two numbers only.

    Attributes:
        tasks: the experts.
        directions: how many leading directions of each.
        top: how many experts a token goes to.
    """

    tasks: tuple[str, ...]
    directions: int
    top: int
    kind: str = "subspace"

    @property
    def stored(self) -> Weights:
        """The two numbers."""
        return StateDict({"directions": torch.tensor(self.directions), "top": torch.tensor(self.top)})

    def over(self, model: Model, base: Weights, merged: Merged, *, device: torch.device = CPU) -> Model:
        """The model whose linear layers route their tokens."""
        return TokenRouted(shown(model, "linear layers are routed here"), base, merged, self, device=device)

    @classmethod
    def restore(cls, stored: Weights, tasks: tuple[str, ...]) -> "SubspaceRouter":
        """The router of a file."""
        return cls(tasks, int(stored["directions"]), int(stored["top"]))


class LayerExperts(NamedTuple):
    """What each expert adds to one linear layer: right [n, k], left [m, k], and a bias [m] where there is one."""

    right: Sequence[Tensor]
    left: Sequence[Tensor]
    bias: Sequence[Tensor] | None

    def added(self, x: Tensor, *, directions: int, top: int) -> Tensor:
        """sum_t p_t (left_t right_t^T x + bias_t) over the best experts of every token, [..., n] to [..., m].

        >>> first, second = torch.eye(2).split(1, dim=1)
        >>> layer = LayerExperts([first, second], [2 * first, 3 * first], None)
        >>> layer.added(torch.tensor([[1.0, 0.0], [0.5, 1.0]]), directions=1, top=1)
        tensor([[2., 0.],
                [3., 0.]])
        """
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        p = routed(x, [unit_columns(r)[:, :directions] for r in self.right], top)
        out = x.new_zeros(len(x), len(self.left[0]))
        for t, (right, left) in enumerate(zip(self.right, self.left, strict=True)):
            chosen = p[:, t].nonzero()[:, 0]
            if len(chosen):
                y = x[chosen] @ right.to(x) @ left.T.to(x)
                y = y if self.bias is None else y + self.bias[t].to(x)
                out[chosen] += p[chosen, t, None] * y
        return out.reshape(*shape[:-1], out.shape[-1])


def routed(x: Tensor, directions: Sequence[Tensor], top: int) -> Tensor:
    """Weights over the experts, 0 for all but the `top` best of every row, which sum to 1: [n, d] to [n, T].

    p = softmax_t |V_t^T x|, cut and renormalised; singular values play no part.

    Args:
        x: one token a row.
        directions: V_t, [d, k] with orthonormal columns (or zero ones, where an expert changed nothing).
        top: how many experts a token goes to; of equal ones the first.

    >>> routed(torch.tensor([[0.0, 2.0]]), list(torch.eye(2).split(1, dim=1)), top=1)
    tensor([[0., 1.]])
    """
    lengths = torch.stack([torch.linalg.vector_norm(x @ v.to(x), dim=1) for v in directions], 1)
    best = lengths.sort(dim=1, descending=True, stable=True).indices[:, :top]
    p = lengths.softmax(1)
    kept = torch.zeros_like(p).scatter(1, best, p.gather(1, best))
    return kept / kept.sum(1, keepdim=True)


def unit_columns(matrix: Tensor) -> Tensor:
    """The columns scaled to length 1; zero ones stay.

    >>> unit_columns(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor([[0.6000, 0.0000],
            [0.8000, 0.0000]])
    """
    lengths: Tensor = torch.linalg.vector_norm(matrix, dim=0)
    return matrix / lengths.where(lengths > 0, 1.0)


class TokenRouted:
    """y = W_0 x + b_0 + what the experts of the token x add, in every linear layer that has factors.

    Args:
        model: what is run; its module's linear layers are watched while it runs.
        base: theta_0, with every tensor that the model is to be given.
        merged: what all share beside these layers, and the factors.
        router: how many directions and experts.
        device: where the model computes.

    Raises:
        DataError: such a layer is part of an attention that never calls it, so that nothing can be added.
    """

    def __init__(
        self, model: OpenModel, base: Weights, merged: Merged, router: SubspaceRouter, *, device: torch.device = CPU
    ) -> None:
        self._model, self._router = model, router
        weights = add(base, merged.shared, dtype=torch.float32)
        self._weights = {name: w.to(device) for name, w in weights.items()}
        patches = [patch for patch in (merged.patches[t] for t in router.tasks) if isinstance(patch, FactorPatch)]
        base_name = {own: name for name, own in model.names.items()}
        self._layers: list[tuple[nn.Module, LayerExperts]] = []
        for name, path in linear_layers(model, patches[0].under(LEFT)).items():
            parent = model.module.get_submodule(path.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                raise DataError(
                    f"'{name}' belongs to a torch.nn.MultiheadAttention, which reads its weight and never calls the "
                    f"layer: its tokens cannot be routed. Merge with skip: ['{name}']."
                )
            layer = model.module.get_submodule(path)
            sides = [[patch.under(side)[name].contiguous().to(device) for patch in patches] for side in (RIGHT, LEFT)]
            bias = base_name.get(f"{path}.bias".lstrip("."), "")
            biases = [p.under(WHOLE)[bias].to(device) for p in patches] if bias in patches[0].under(WHOLE) else None
            right, left = reversed(sides) if is_transposed(layer) else sides
            self._layers.append((layer, LayerExperts(right, left, biases)))

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores [n, classes] under the head of `task`; `weights` are not asked for."""
        with self._routing():
            return self._model.logits(self._weights, inputs, task)

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        """Class scores and features."""
        with self._routing():
            return told(self._model).outputs(self._weights, inputs, task)

    @contextmanager
    def _routing(self) -> Iterator[None]:
        options = {"directions": self._router.directions, "top": self._router.top}

        def hook(experts: LayerExperts) -> Any:
            def added(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
                with torch.autocast(y.device.type, enabled=False):  # lengths are compared in float32
                    return y + experts.added(args[0].float(), **options).to(y)

            return added

        hooks = [layer.register_forward_hook(hook(experts)) for layer, experts in self._layers]
        try:
            yield
        finally:
            for one in hooks:
                one.remove()
