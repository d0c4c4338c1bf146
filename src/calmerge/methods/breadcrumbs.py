"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024)."""

from typing import Annotated, Literal

from calmerge._signature import Fraction, Interval, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.pieces.middle import middle


def breadcrumbs(
    tvs: TaskVectors,
    *,
    keep: Fraction = 0.15,
    outliers: Fraction = 0.006,
    scale: Annotated[float, Interval()] = 0.2,
    scope: Literal["row", "tensor"] = "row",
    remove_first: bool = True,
) -> Weights:
    """Drop each task vector's outliers and its small entries, and add up what lies between.

    theta = theta_0 + alpha sum_t m_t * tau_t; m_t is 1 below the largest share gamma and above all but the next share
    beta of magnitudes, counted in every row or tensor.

    Args:
        tvs: task vectors of T experts.
        keep: beta of the official code, the share kept, in [0, 1]. The paper's beta and gamma are percentiles: its
            (85 %, 99.3 %) are `keep=0.143, outliers=0.007`.
        outliers: gamma of the official code, the share of largest entries removed, in [0, 1].
        scale: alpha; settings found with few tasks are meant to hold as tasks are added.
        scope: magnitudes compete within a `row` along the last dimension (official code) or a `tensor` (paper).
        remove_first: outliers go before the largest are kept; without it, from among them, and fewer stay.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": torch.tensor([9.0, -8.0, 7.0, 6.0, 5.0])}})
    >>> breadcrumbs(tvs, keep=0.4, outliers=0.2, scale=0.5)["w"]
    tensor([ 0.0000, -4.0000,  3.5000,  0.0000,  0.0000])

    Source: Davari, Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024;
    rezazzr/breadcrumbs (no licence file in the copy read).
    Differences: equal magnitudes at a cut stay, where the official code keeps one or the other of them.
    """
    options = {"keep": keep, "outliers": outliers, "scope": scope, "remove_first": remove_first}
    raise_together(check(breadcrumbs, options | {"scale": scale}))
    return task_arithmetic(middle(tvs, **options), scale=scale)  # type: ignore[arg-type]
