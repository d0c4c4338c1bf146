"""Task Arithmetic (Ilharco et al., ICLR 2023)."""

from typing import Annotated

from calmerge._signature import Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.blend import summed


def task_arithmetic(tvs: TaskVectors, *, scale: Annotated[float, Interval()] = 0.3) -> Weights:
    """The sum of all task vectors times one number.

    theta = theta_0 + lambda sum_t tau_t. A negative lambda with one expert is forgetting by negation.

    Args:
        tvs: task vectors of T experts.
        scale: lambda; 0.3 is the published default for eight vision tasks, 1/T is averaging. It wants to fall as T
            grows, and is usually chosen on validation data from 0.05 to 1.

    >>> import torch; from calmerge import task_vectors
    >>> experts = {t: {"w": torch.tensor([x])} for t, x in {"a": 1.4, "b": 1.2, "c": 0.9}.items()}
    >>> task_arithmetic(task_vectors({"w": torch.tensor([1.0])}, experts), scale=0.3)["w"] + 1
    tensor([1.1500])

    Source: Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi, "Editing Models with Task Arithmetic",
    ICLR 2023; mlfoundations/task_vectors (no licence file in the copy read).
    Differences: the official code skips only int64 and uint8 tensors; here every tensor that is not floating.
    """
    raise_together(check(task_arithmetic, {"scale": scale}))
    return tvs.reduce(lambda tau, site: summed(tau) * scale)
