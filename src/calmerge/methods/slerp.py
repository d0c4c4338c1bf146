"""Spherical interpolation of two models: SLERP and NuSLERP."""

from typing import Annotated

import torch
from torch import Tensor

from calmerge._errors import UsageError
from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.gram import Of, lengths, spanned


def slerp(tvs: TaskVectors, *, t: Annotated[float, Interval()], of: Of = "weights") -> Weights:
    """Two models interpolated along the arc between them, tensor by tensor.

    theta = [sin((1 - t) Omega) theta_1 + sin(t Omega) theta_2] / sin Omega, where Omega is the angle between the two,
    each flattened; where |cos Omega| > 0.9995, theta = (1 - t) theta_1 + t theta_2.

    Args:
        tvs: task vectors of two experts, or of the base itself and one expert.
        t: where on the arc: 0 is the first model, 1 the second; numbers beyond extrapolate.
        of: whether the angle is that of the `weights`, or that of the task vectors (`deltas`), which are then
            interpolated.

    Raises:
        UsageError: there are not two models.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    >>> slerp(task_vectors({"w": torch.zeros(2)}, experts), t=0.5)["w"]
    tensor([0.7071, 1.4142])

    Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; for model weights a community method
    in the form of arcee-ai/mergekit (LGPL-3.0; Goddard et al., arXiv 2024).
    Differences: the angle is found in float64. A vector no longer than 1e-8 counts as orthogonal to the other.
    """
    raise_together(check(slerp, {"t": t, "of": of}))
    two_models("slerp", tvs)

    def arc(gram: Tensor, name: str) -> Tensor:
        cos = cosine(gram, floor=1e-8)
        return straight(t) if abs(cos) > 0.9995 else curved(t, torch.acos(cos))

    return spanned(tvs, arc, of=of)


def two_models(name: str, tvs: TaskVectors) -> None:
    """Refuses any number of models but two.

    >>> from calmerge import task_vectors
    >>> two_models("slerp", task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}}))
    Traceback (most recent call last):
    calmerge._errors.UsageError: slerp interpolates two models, got 1 (a). Choose two; ...
    """
    if len(tvs.tasks) != 2:
        raise UsageError(
            f"{name} interpolates two models, got {len(tvs.tasks)} ({', '.join(tvs.tasks)}). "
            "Choose two; multislerp and karcher take any number."
        )


def cosine(gram: Tensor, *, floor: float = 0.0) -> Tensor:
    """The cosine of the angle between two vectors, from their inner products; 0 if one is no longer than `floor`.

    >>> cosine(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
    tensor(0.5000)
    """
    norms = lengths(gram)  # [..., 2]
    cos = (gram[..., 0, 1] / norms.prod(-1)).clamp(-1, 1)
    return torch.where((norms <= floor).any(-1), 0.0, cos)


def straight(t: float) -> Tensor:
    """Coefficients of linear interpolation.

    >>> straight(0.25)
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    return torch.tensor([1 - t, t], dtype=torch.float64)


def curved(t: float, omega: Tensor) -> Tensor:
    """Coefficients of interpolation along an arc of the angle `omega`, or along several.

    >>> curved(0.5, torch.tensor(torch.pi / 2))
    tensor([0.7071, 0.7071], dtype=torch.float64)
    """
    return torch.sin(straight(t) * omega[..., None]) / torch.sin(omega[..., None])
