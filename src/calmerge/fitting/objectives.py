"""Losses that need no labels, each a function of logits and targets."""

from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from calmerge.tasks.base import Outputs


def entropy(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Mean prediction entropy, -(1/n) sum_i sum_c p_ic ln p_ic, in nats, finite for any logits.

    >>> entropy(torch.zeros(3, 2))
    tensor(0.6931)
    """
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def pseudo_label(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Mean cross-entropy against labels that a task's expert gave.

    >>> pseudo_label(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    tensor(0.6931)
    """
    assert targets is not None
    return cross_entropy(logits, targets)


def expert_kl(logits: Tensor, targets: Tensor | None, *, temperature: float = 2.0) -> Tensor:
    """How far the predictions are from the expert's soft ones, at a temperature.

    L = (theta^2 / n) sum_i KL(softmax(z_i / theta) || softmax(logits_i / theta)), with z the expert's logits.

    Args:
        logits: of the merged model, [n, classes].
        targets: z, [n, classes].
        temperature: theta, positive; above 1 small probabilities count more. The factor theta^2 keeps the gradient's
            size.

    >>> expert_kl(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(0.)

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 2015.
    """
    assert targets is not None
    log_p = (logits / temperature).log_softmax(1)
    log_q = (targets / temperature).log_softmax(1)
    return temperature**2 * kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def feature_distance(outputs: Outputs, features: Tensor) -> Tensor:
    """Squared distance between the features a head is given and those of the task's expert, relative to these.

    L = sum_i |f_i - e_i|^2 / sum_i |e_i|^2

    >>> same = torch.ones(2, 3)
    >>> feature_distance(Outputs(torch.zeros(2, 2), 2 * same), same)
    tensor(1.)
    """
    return (outputs.features - features).square().sum() / features.square().sum().clamp(min=1e-12)
