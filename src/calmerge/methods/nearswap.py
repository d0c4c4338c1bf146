"""nearswap: towards another model, by a bounded step for every weight."""

from calmerge._errors import UsageError
from calmerge._signature import NonNegative, check, raise_together
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights


def nearswap(tvs: TaskVectors, *, t: NonNegative) -> Weights:
    """The base with every weight moved towards the one expert by at most t.

    theta = w theta_1 + (1 - w) theta_0, w = min(1, t / |theta_1 - theta_0|): weights that are nearer than t become the
    expert's.

    Args:
        tvs: task vectors of one expert.
        t: the longest step, at least 0.

    Raises:
        UsageError: there is not exactly one expert.

    >>> import torch; from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([0.1, 0.5, -3.0])}})
    >>> nearswap(tvs, t=0.25)["w"]
    tensor([ 0.1000,  0.2500, -0.2500])

    Source: a community method (alchemonaut) in the form of arcee-ai/mergekit (LGPL-3.0; Goddard et al., arXiv 2024).
    Differences: distances below 1e-6 count as 1e-6, as there. No benchmark supports it.
    """
    raise_together(check(nearswap, {"t": t}))
    one_expert("nearswap", tvs)
    return tvs.reduce(lambda tau, site: tau[0] * (t / tau[0].abs().clamp(min=1e-6)).clamp(max=1))


def one_expert(name: str, tvs: TaskVectors) -> None:
    """Refuses any number of experts but one.

    >>> import torch; from calmerge import task_vectors
    >>> one_expert("nearswap", task_vectors({"w": torch.zeros(1)}, {t: {"w": torch.ones(1)} for t in "ab"}))
    Traceback (most recent call last):
    calmerge._errors.UsageError: nearswap takes the base and one expert, got 2 experts (a, b). Choose one.
    """
    if len(tvs.tasks) != 1:
        raise UsageError(
            f"{name} takes the base and one expert, got {len(tvs.tasks)} experts ({', '.join(tvs.tasks)}). Choose one."
        )
