"""Updates of whole matrices: what moves a matrix is made orthogonal, so that no few directions take it all."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calmerge.fitting.fit import Params
from calmerge.pieces.matrices import is_matrix


class Orthogonal:
    """Muon for matrices and Adam for all else, as one optimizer with one step size.

    Of a matrix [m, n], M = beta M + (1 - beta) G, and the next U is U - 0.2 lr sqrt(max(m, n)) P, where five steps of
    Newton and Schulz make P of beta M + (1 - beta) G, nearly its polar factor (beta = 0.95). So entries move by 0.2 lr
    in the root mean square, as they mostly do with Adam.

    Args:
        params: what is to be learned.
        matrices: for each whether it is treated as a matrix.
        lr: the step size.

    >>> matrix, vector = torch.zeros(2, 2, requires_grad=True), torch.zeros(1, requires_grad=True)
    >>> optim = Orthogonal([matrix, vector], [True, False], lr=0.1)
    >>> (100 * matrix[0, 0] + matrix[1, 1] + 3 * vector).sum().backward()
    >>> optim.step()
    >>> vector
    tensor([-0.1000], requires_grad=True)
    >>> bool(matrix[1, 1] < -0.01)  # though the loss depends on it a hundred times less
    True

    Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, as torch.optim.Muon.
    """

    def __init__(self, params: Sequence[Tensor], matrices: Sequence[bool], *, lr: float) -> None:
        whole = [p for p, matrix in zip(params, matrices, strict=True) if matrix]
        rest = [p for p, matrix in zip(params, matrices, strict=True) if not matrix]
        self.parts: list[torch.optim.Optimizer] = []
        if whole:
            self.parts.append(torch.optim.Muon(whole, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        if rest:
            self.parts.append(torch.optim.Adam(rest, lr))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of both, each with its own step size."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One update by the gradients."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What both need to go on."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def orthogonal(start: Params) -> partial[Orthogonal]:
    """What makes the optimizer of a fit from `start` whose parameters have tensors' names and shapes.

    >>> optim = orthogonal({"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)})
    >>> optim.keywords
    {'matrices': [True, False]}
    """
    return partial(Orthogonal, matrices=[is_matrix(name, p.dim()) for name, p in start.items()])
