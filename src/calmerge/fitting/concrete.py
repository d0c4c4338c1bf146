"""Concrete masks: relaxed Bernoulli draws that a gradient goes through, and their bi-level fit (Tang et al., 2023)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calmerge._random import uniform
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.fitting.fit import Fitted, Params, Stateful, empty, fit, pull_back, write
from calmerge.tasks.base import Gradient

Evaluation = Literal["draw", "expected"]


def concrete_mask(logits: Tensor, u: Tensor, *, temperature: float = 0.5) -> Tensor:
    """A soft mask drawn with uniform numbers, scaled to mean 1 over the tensor.

    m = sigma((ln(u / (1 - u)) + x) / temperature);  m / mean(m), the gradient flowing through the mean too.

    Args:
        logits: x, one for each entry.
        u: uniform numbers in (0, 1), of the same shape.
        temperature: the lower, the nearer to 0 and 1.

    >>> concrete_mask(torch.zeros(2), torch.tensor([0.9, 0.1]))
    tensor([1.9756, 0.0244])
    """
    return _scaled(((u.logit() + logits) / temperature).sigmoid())


def final_masks(logits: Params, *, temperature: float, evaluation: Evaluation, seed: object) -> dict[str, Tensor]:
    """The mask of every tensor that a merge is made with: of each part one more draw, or its expected mask sigma(x).

    Each is scaled to mean 1 over the tensor; where there are several parts, their product.

    Args:
        logits: x by "part/tensor", as `learn_masks` gives them.
        temperature: of the draw.
        evaluation: `draw` or `expected`.
        seed: decides the draw, which every part has for itself.

    >>> final_masks({"mask/w": torch.tensor([0.0, 2.0])}, temperature=0.5, evaluation="expected", seed=0)["w"]
    tensor([0.7242, 1.2758])
    """
    masks: dict[str, Tensor] = {}
    for name, x in logits.items():
        if evaluation == "expected":
            mask = _scaled(x.sigmoid())
        else:
            mask = concrete_mask(x, noise(x, seed, "final", name), temperature=temperature)
        tensor = name.split("/", 1)[1]
        masks[tensor] = masks[tensor] * mask if tensor in masks else mask
    return masks


def noise(like: Tensor, *key: object) -> Tensor:
    """Uniform numbers strictly between 0 and 1, of the shape and on the device of `like`, decided by `key` alone.

    >>> torch.equal(noise(torch.zeros(3), 0, "w"), noise(torch.zeros(3), 0, "w"))
    True
    """
    return uniform(tuple(like.shape), *key).clamp(2.0**-25, 1 - 2.0**-24).to(like.device)


def masked(tvs: TaskVectors, masks: Mapping[str, Tensor]) -> TaskVectors:
    """Every task vector times one mask that all tasks share.

    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> masked(tvs, {"w": torch.tensor([2.0, 0.0])})["w"]
    tensor([[2., 0.]])
    """
    return tvs.transform(lambda tau, site: tau * masks[site.name], elementwise=False)


class Draw(NamedTuple):
    """How masks are drawn and moved; methods have arguments of the same names."""

    temperature: float
    steps: int
    lr: float
    inner_lr: float
    seed: int


def learn_masks(
    tvs: TaskVectors,
    parts: Sequence[str],
    coefficients: Tensor,
    gradient: Gradient,
    draw: Draw,
    *,
    inner: bool,
    clamp: bool,
    after_inner: Callable[[int, Mapping[str, Tensor]], None] | None = None,
    companions: Mapping[str, Stateful] | None = None,
    run: Run,
    label: str,
    key: str,
) -> Fitted:
    """Mask logits, shared by all tasks, fitted through fresh draws; their names are "part/tensor".

    theta = theta_0 + m sum_t lambda_t tau_t, m the product of one Concrete mask for each of `parts` (which move in
    turn). With `inner` the coefficients lambda go back to `coefficients` and take one step of Adam at the mask as it
    stands before every update of the logits (first order: nothing flows through that step).

    Args:
        tvs: task vectors.
        parts: names of the masks.
        coefficients: lambda at the start of every inner problem, [T] or [T, tensors].
        gradient: called with 2 * update for the inner step and 2 * update + 1 for the logits.
        draw: temperature, updates, step sizes and seed.
        inner: whether the coefficients move.
        clamp: use coefficients clamped to [0, 1].
        after_inner: called with the update and theta (without a graph) between the two steps.
        companions: what `after_inner` moves, to be saved with the state.
        run: progress and resumable state.
        label: names the progress bar and the state's file.
        key: describes everything that decides the result.
    """
    lam = coefficients.clone().requires_grad_()
    adam = torch.optim.Adam([lam], lr=draw.inner_lr)  # its state outlives the resets, as in the official code
    drawn: dict[str, Tensor] = {}
    theta = empty(tvs, coefficients.device)

    def merged(params: Params, used: Tensor, moving: Sequence[str]) -> Weights:
        def masks(tensor: str) -> Iterator[Tensor]:
            for part in parts:
                name = f"{part}/{tensor}"
                x = params[name] if part in moving else params[name].detach()
                yield concrete_mask(x, drawn[name], temperature=draw.temperature)

        return _blended(tvs, used, masks, clamp=clamp)

    def before(step: int, params: Params) -> None:
        drawn.update({name: noise(x, draw.seed, "mask", step, name) for name, x in params.items()})
        moving[:] = [parts[step % len(parts)]]
        if not inner:
            return
        lam.data.copy_(coefficients)
        delta = merged(params, lam, [])
        write(theta, tvs.base, delta)
        gradient(theta, 2 * step)
        pull_back(delta, theta, {"coefficients": lam})
        adam.step()
        adam.zero_grad()
        if after_inner:
            write(theta, tvs.base, merged(params, lam.detach(), []))
            after_inner(step, {name: w.detach() for name, w in theta.items()})

    moving: list[str] = list(parts[:1])
    start = {
        f"{part}/{name}": torch.zeros(spec.shape, device=coefficients.device)
        for part in parts
        for name, spec in tvs.specs.items()
    }
    drawn.update({name: torch.full_like(x, 0.5) for name, x in start.items()})
    return fit(
        lambda params: merged(params, lam.detach(), moving),
        start,
        lambda theta, step: gradient(theta, 2 * step + 1),
        base=tvs.base,
        optimizer=partial(torch.optim.Adam, lr=draw.lr),
        steps=draw.steps,
        before=before,
        companions={"inner": adam, **(companions or {})},
        run=run,
        label=label,
        key=key,
    )


def _blended(
    tvs: TaskVectors, coefficients: Tensor, masks: Callable[[str], Iterable[Tensor]], *, clamp: bool
) -> Weights:
    """Of every tensor the sum of lambda_t tau_t, times its masks; lambda is [T] or [T, tensors]."""
    column = {name: i for i, name in enumerate(tvs.specs)}

    def mix(tau: Tensor, site: Site) -> Tensor:
        own = coefficients[:, column[site.name]] if coefficients.dim() == 2 else coefficients
        blended: Tensor = torch.tensordot(own.clamp(0, 1) if clamp else own, tau, dims=1)
        for mask in masks(site.name):
            blended = blended * mask
        return blended

    return tvs.reduce(mix, elementwise=False)


def _scaled(soft: Tensor) -> Tensor:
    return soft / soft.mean() if soft.numel() else soft
