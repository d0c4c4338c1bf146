"""mergekit's `ties`: trimmed tensor by tensor, weighted before the vote."""

from typing import Annotated

from calmerge._signature import Interval
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Weights
from calmerge.pieces.fuse import fuse
from calmerge.pieces.largest import keep_largest
from calmerge.pieces.per_model import FractionPerModel, PerModel, checked
from calmerge.pieces.rescale import restore_l1


def mergekit_ties(
    tvs: TaskVectors,
    *,
    weight: PerModel,
    density: FractionPerModel = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    lambda_: Annotated[float, Interval()] = 1.0,
) -> Weights:
    """Trim every tensor, let the weighted rest elect signs, add up what agrees, as mergekit's `ties`.

    tau_hat_t = the int(density_t n) largest of the n entries of each tensor, at least one if density_t > 0;
    s = sign(sum_t w_t tau_hat_t), where 0 counts as plus;
    delta = lambda sum_t w_t tau_hat_t / sum_t w_t, both sums over the tasks that have the sign s.

    Args:
        tvs: task vectors of T experts.
        weight: w, one number for each model or one for all; they count in the vote.
        density: share of each tensor that is kept, one number for each model or one for all, in [0, 1].
        normalize: whether to divide by the weights of those that agree.
        rescale: whether each trimmed tensor is scaled back to its former L1 norm.
        lambda_: a factor on the result.

    >>> import torch; from calmerge import task_vectors
    >>> a, b = torch.tensor([3.0, -1.0, 2.0, 0.0, 0.0]), torch.tensor([-2.0, -4.0, 0.0, 0.0, 1.0])
    >>> tvs = task_vectors({"w": torch.zeros(5)}, {"a": {"w": a}, "b": {"w": b}})
    >>> mergekit_ties(tvs, weight=[1.0], density=[0.4])["w"]
    tensor([ 3., -4.,  2.,  0.,  0.])

    Source: "ties" of arcee-ai/mergekit 0.1.5 (LGPL-3.0; Goddard et al., arXiv 2024); Yadav et al., NeurIPS 2023.
    Differences: from `ties`, the threshold is each tensor's, the weights count before the vote, a sum of 0 counts as
    plus, and one divides by weights instead of counts. Equal magnitudes at a cut are chosen by their place (see
    `largest`), in mergekit by an unstable sort.
    """
    given = {"weight": weight, "density": density, "normalize": normalize, "rescale": rescale, "lambda_": lambda_}
    each = checked(mergekit_ties, tvs, given)
    kept = keep_largest(tvs, lambda name, n: [max(1, int(share * n)) if share else 0 for share in each["density"]])
    kept = restore_l1(kept, tvs) if rescale else kept
    return fuse(kept, each["weight"], vote=True, normalize=normalize, scale=lambda_)
