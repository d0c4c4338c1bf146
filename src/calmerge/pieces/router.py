"""A router that tells an input's tasks from its features, and the model that it mixes for every input."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, linear

from calmerge._merged import Merged
from calmerge._random import uniform
from calmerge._task_vectors import materialise
from calmerge._weights import Weights, add
from calmerge.tasks.base import FeatureModel, Model, Outputs, told

_STEP = 1 / 256  # to which weights over tasks are told apart: inputs with equal ones share a model
CPU = torch.device("cpu")
_EPSILON = 1e-5  # added to variances


@dataclass(frozen=True)
class NeuralRouter:
    """softmax of Linear(d, 2d) - BatchNorm - LeakyReLU - Linear(2d, 2d) - BatchNorm - LeakyReLU - Linear(2d, T).

    Attributes:
        tasks: the names of its outputs.
        stored: its tensors, and the means and variances that it normalises by.
    """

    tasks: tuple[str, ...]
    stored: Weights
    kind: str = "neural"

    def __call__(self, features: Tensor) -> Tensor:
        """Weights over the tasks that sum to 1: [inputs, d] to [inputs, T]."""
        with torch.autocast("cpu", enabled=False):
            return router_logits(self.stored, features.cpu().float()).softmax(1)

    def over(self, model: Model, base: Weights, merged: Merged, *, device: torch.device = CPU) -> Model:
        """The model which mixes its weights for every input."""
        return Mixture(told(model), base, merged, self, device=device)

    @classmethod
    def restore(cls, stored: Weights, tasks: tuple[str, ...]) -> "NeuralRouter":
        """The router of a file."""
        return cls(tasks, materialise(stored))


def router_start(d: int, outputs: int, *key: object) -> dict[str, Tensor]:
    """The router's tensors before training: uniform in +-1 / sqrt(fan in), scales 1, shifts 0.

    >>> {name: tuple(t.shape) for name, t in router_start(2, 3, 0).items() if name.endswith("weight")}
    {'0.weight': (4, 2), '1.weight': (4, 4), '2.weight': (3, 4), 'norm0.weight': (4,), 'norm1.weight': (4,)}
    """
    sizes = [d, 2 * d, 2 * d, outputs]
    made = {}
    for i in range(3):
        bound = sizes[i] ** -0.5
        made[f"{i}.weight"] = (2 * uniform((sizes[i + 1], sizes[i]), *key, i, "weight") - 1) * bound
        made[f"{i}.bias"] = (2 * uniform((sizes[i + 1],), *key, i, "bias") - 1) * bound
    for i in range(2):
        made[f"norm{i}.weight"], made[f"norm{i}.bias"] = torch.ones(2 * d), torch.zeros(2 * d)
    return made


def router_logits(
    p: Mapping[str, Tensor],
    x: Tensor,
    *,
    drop: Callable[[Tensor, int], Tensor] = lambda x, i: x,
    found: dict[str, Tensor] | None = None,
) -> Tensor:
    """Scores over the tasks, [n, d] to [n, T].

    Args:
        p: the router's tensors.
        x: features.
        drop: what is done to the hidden units of layer i.
        found: normalise by the means and variances of these very inputs, and put them here; those in `p` when None.
    """
    for i in range(2):
        x = linear(x, p[f"{i}.weight"], p[f"{i}.bias"])
        if found is not None:
            found[f"norm{i}.mean"], found[f"norm{i}.variance"] = x.mean(0), x.var(0, unbiased=False)
        known = p if found is None else found
        x = (x - known[f"norm{i}.mean"]) * (known[f"norm{i}.variance"] + _EPSILON).rsqrt()
        x = drop(leaky_relu(x * p[f"norm{i}.weight"] + p[f"norm{i}.bias"]), i)
    return linear(x, p["2.weight"], p["2.bias"])


def pooled(features: Tensor) -> Tensor:
    """Features with one vector an input, the mean over tokens where there are several: [n, ..., d] to [n, d].

    >>> pooled(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[2., 3.]])
    """
    return features if features.dim() == 2 else features.reshape(len(features), -1, features.shape[-1]).mean(1)


class Mixture:
    """theta(x) = theta_s + sum_t w_t(x) (theta_t - theta_s), one model for all inputs of a batch with the same w.

    Args:
        model: what is run, under mixed weights.
        base: theta_0, with every tensor that the model is to be given.
        merged: theta_s and theta_t, all of which are held in memory.
        router: w, from the features that theta_s gives.
        device: where the model computes.
    """

    def __init__(
        self, model: FeatureModel, base: Weights, merged: Merged, router: NeuralRouter, *, device: torch.device = CPU
    ) -> None:
        self._model, self._router = model, router
        shared = materialise(add(base, merged.shared, dtype=torch.float32))
        own = {task: merged.for_task(task) for task in router.tasks}
        moved = {n for vector in own.values() for n in vector.specs}
        experts = [add(base.only_names(moved), vector, dtype=torch.float32) for vector in own.values()]
        self._exclusive = {n: torch.stack([e.read(n) - shared[n] for e in experts]).to(device) for n in moved}
        self._shared = {n: w.to(device) for n, w in shared.items()}

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores [n, classes] under the head of `task`; `weights` are not asked for."""
        return self.outputs(weights, inputs, task).logits

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        """Class scores and features."""
        w = self._router(pooled(self._model.outputs(self._shared, inputs, task).features))
        mixtures, which = (w / _STEP).round().unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
        parts, places = [], []
        for i, mixture in enumerate(mixtures * _STEP):
            places.append((which == i).nonzero()[:, 0])
            parts.append(self._model.outputs(self._mixed(mixture), _some(inputs, places[-1]), task))
        back = torch.cat(places).argsort()
        return Outputs(*(torch.cat(part)[back.to(part[0].device)] for part in zip(*parts, strict=True)))

    def _mixed(self, mixture: Tensor) -> dict[str, Tensor]:
        def one(name: str) -> Tensor:
            shared = self._shared[name]
            if name not in self._exclusive:
                return shared
            added: Tensor = torch.tensordot(mixture.to(shared), self._exclusive[name], 1)
            return shared + added

        with torch.autocast(next(iter(self._shared.values())).device.type, enabled=False):  # in float32
            return {name: one(name) for name in self._shared}


def _some(inputs: Any, chosen: Tensor) -> Any:
    """Some of the inputs of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[chosen.to(inputs.device)]
    if isinstance(inputs, Mapping):
        return {k: _some(v, chosen) for k, v in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_some(v, chosen) for v in inputs)
    return inputs
