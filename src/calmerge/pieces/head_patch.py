"""Patches that stand between a merged model's features and class scores: small, per task, and declared as such."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calmerge._task_vectors import materialise
from calmerge._weights import StateDict, Weights

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SurgeryPatch:
    """The shared vector as it is, and a small net which takes its bias out of the features: z' = z - U ReLU(D z).

    Attributes:
        stored: down [r, d] and up [d, r].

    >>> patch = SurgeryPatch(StateDict({"down": torch.tensor([[1.0, 0.0]]), "up": torch.tensor([[0.0], [2.0]])}))
    >>> patch.scores(torch.tensor([[3.0, 5.0], [-3.0, 5.0]]), head=lambda z: z)
    tensor([[ 3., -1.],
            [-3.,  5.]])
    """

    stored: Weights
    kind: str = "surgery"

    def apply(self, shared: Weights) -> Weights:
        """The shared vector: all tasks have the same weights."""
        return shared

    def scores(self, features: Tensor, head: Head) -> Tensor:
        """Class scores of the corrected features, [n, ..., d] to [n, classes]."""
        z = features.float()
        with torch.autocast(z.device.type, enabled=False):
            corrected = operated(z, self.stored["down"].to(z), self.stored["up"].to(z))
        return head(corrected)

    @classmethod
    def restore(cls, stored: Weights, shared: Weights) -> "SurgeryPatch":
        """The patch of a file."""
        return cls(materialise(stored))


def operated(features: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """z - U ReLU(D z) of features [..., d], with D [r, d] and U [d, r].

    >>> operated(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(2, 1))
    tensor([[1., 1.]])
    """
    return features - torch.relu(features @ down.T) @ up.T


@dataclass(frozen=True)
class AffinePatch:
    """The shared vector as it is, and W z + c added to the features z, or to the class scores of z.

    Attributes:
        stored: features/weight [d, d] and features/bias [d], or logits/weight [classes, d] and logits/bias [classes].

    >>> weight, bias = torch.tensor([[0.0, 1.0]]), torch.tensor([0.5])
    >>> AffinePatch.of("logits", weight, bias).scores(torch.tensor([[2.0, 3.0]]), head=lambda z: z[:, :1])
    tensor([[5.5000]])
    """

    stored: Weights
    kind: str = "affine"

    @classmethod
    def of(cls, what: str, weight: Tensor, bias: Tensor) -> "AffinePatch":
        """The patch that adds to `features` or to `logits`; laid out as in a file, for products round by the layout."""
        return cls(StateDict({f"{what}/weight": weight.contiguous(), f"{what}/bias": bias}))

    def apply(self, shared: Weights) -> Weights:
        """The shared vector: all tasks have the same weights."""
        return shared

    def scores(self, features: Tensor, head: Head) -> Tensor:
        """Class scores, [n, ..., d] to [n, classes]."""
        what = "features" if "features/weight" in self.stored else "logits"
        z = features.float()
        with torch.autocast(z.device.type, enabled=False):
            added = z @ self.stored[f"{what}/weight"].to(z).T + self.stored[f"{what}/bias"].to(z)
        return head(z + added) if what == "features" else head(features) + added

    @classmethod
    def restore(cls, stored: Weights, shared: Weights) -> "AffinePatch":
        """The patch of a file."""
        return cls(materialise(stored))
