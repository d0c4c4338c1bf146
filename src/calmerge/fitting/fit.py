"""The one optimisation loop: every method that learns by gradient is a call of `fit`."""

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from calmerge._errors import CalmergeError, FitError, UsageError
from calmerge._run import Run
from calmerge._weights import Weights
from calmerge.report.traces import FitTrace
from calmerge.tasks.base import Gradient

Params = Mapping[str, Tensor]
SAVE_EVERY = 20.0  # seconds between two saved states


class Stateful(Protocol):
    """Anything that can be saved and go on, such as a torch optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """What it needs to go on."""

    def load_state_dict(self, state: Any) -> None:
        """Go on from what `state_dict` gave."""


class Optimizer(Stateful, Protocol):
    """A torch optimizer, or what can stand for one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Its step sizes stand here, under `lr`."""

    def step(self) -> Any:
        """One update by the gradients."""

    def zero_grad(self) -> None:
        """Forget the gradients."""


@dataclass
class Fitted:
    """Parameters after the last update (or the best ones, with `Watch`), and what was seen on the way.

    Attributes:
        params: the parameters.
        loss: by task, at every update.
        observed: what `observe` told, at every update.
        watched: the held-out loss, each time it was looked at.
        step: how many updates led to `params`.
        seconds: what the updates took, before an interruption too.
    """

    params: dict[str, Tensor]
    loss: dict[str, list[float]] = field(default_factory=dict)
    observed: dict[str, list[float]] = field(default_factory=dict)
    watched: list[float] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> list[float]:
        """The loss summed over tasks, at every update."""
        return [sum(step) for step in zip(*self.loss.values(), strict=True)]

    def trace(self, **more: Any) -> FitTrace:
        """What a report keeps of it, and `more` that the method knows."""
        return FitTrace(loss=self.total, per_task=self.loss, held_out=self.watched, **more)


@dataclass(frozen=True)
class Watch:
    """Stopping by a loss on examples held out of the fit: the best parameters are kept, not the last.

    Args:
        loss: from weights to the held-out loss.
        every: updates between two looks; the start is looked at too.
        patience: looks without a better loss after which the fit ends.
    """

    loss: Callable[[Mapping[str, Tensor]], float]
    every: int = 10
    patience: int = 3


def fit(
    merged: Callable[[Params], Weights],
    start: Params,
    gradient: Gradient,
    *,
    base: Weights,
    optimizer: Callable[[list[Tensor]], Optimizer],
    steps: int,
    penalty: Callable[[str, Params], Tensor] | None = None,
    observe: Callable[[Params], Mapping[str, float]] | None = None,
    watch: Watch | None = None,
    schedule: Callable[[int], float] | None = None,
    before: Callable[[int, Params], None] | None = None,
    companions: Mapping[str, Stateful] | None = None,
    run: Run | None = None,
    label: str = "fitting",
    key: str = "",
) -> Fitted:
    """The parameters after `steps` updates on Loss(theta_0 + merged(params)) + penalty.

    Each update materialises theta = theta_0 + merged(params) without a graph, takes one ordinary backward pass of the
    model to dLoss/dtheta, and pulls it back to the parameters tensor by tensor through the lazy merge:

        dLoss/dparams = sum_l (d delta_l / dparams)^T dLoss/dtheta_l

    Held in memory: theta, dLoss/dtheta and the parameters with what the optimizer keeps for them; of the experts no
    more than one tensor at a time.

    Args:
        merged: from parameters to a delta, lazy and differentiable; what it does to the parameters it does when a
            tensor is read, so that every tensor has a graph of its own.
        start: parameters before the first update; not changed.
        gradient: adds dLoss/dtheta to each tensor's `.grad` and tells the loss by task.
        base: theta_0.
        optimizer: from the list of parameters to a torch optimizer, e.g. `partial(torch.optim.Adam, lr=1e-3)`.
        steps: number of updates.
        penalty: by tensor name, what is added to the loss for it.
        observe: numbers to keep, asked for after every update; and once before the first (of a resumed fit, the next),
            for what it compares with.
        watch: a held-out loss that decides when to stop and which parameters to keep (one more copy of them).
        schedule: from the number of an update to what the step size is multiplied by.
        before: called with the number of every update and the parameters, before it: to draw what `merged` reads, or
            to take a step of an inner problem.
        companions: by name, whatever else moves while fitting (an inner problem's optimizer): saved with the state.
        run: where progress is told, and where the state is kept so that an interrupted fit goes on and ends the same.
        label: names the progress bar and the state's file.
        key: describes everything that decides the result; a saved state with another key is refused.

    Raises:
        FitError: a loss or a gradient is not finite.
        UsageError: the saved state belongs to other settings, or is further than `steps`.

    >>> from functools import partial
    >>> from calmerge import StateDict
    >>> base = StateDict({"w": torch.tensor([0.0])})
    >>> def gradient(theta, step):          # Loss = (w - 3)^2 / 2
    ...     (theta["w"] - 3).square().sum().div(2).backward()
    ...     return {"toy": 0.0}
    >>> merged = lambda p: StateDict({"w": p["scale"] * torch.tensor([1.0])})
    >>> sgd = partial(torch.optim.SGD, lr=0.5)
    >>> fit(merged, {"scale": torch.tensor(0.0)}, gradient, base=base, optimizer=sgd, steps=2).params["scale"]
    tensor(2.2500)
    """
    run = run or Run()
    params = {name: p.detach().clone().requires_grad_() for name, p in start.items()}
    run.trained.append(sum(p.numel() for p in params.values()))
    optim = optimizer(list(params.values()))
    rates = [group["lr"] for group in optim.param_groups]
    fitted, first = Fitted(params), 0
    best = _Best(watch, params, fitted) if watch else None
    stateful = {**(companions or {}), "optimizer": optim, **({"best": best} if best else {})}
    state = None
    if run.folder:
        state = _State(run.folder / f"{label.replace(' ', '-')}.state.pt", key, params, stateful, fitted)
        first = state.load(steps)
        if first:
            run.earlier.append(fitted.seconds)
    if observe:
        observe(params)
    theta = empty(merged(params), next(iter(params.values())).device)
    begun = time.monotonic() - fitted.seconds
    with run.progress.track(label, steps, "update") as bar:
        bar.advance(first)
        for step in range(first, steps):
            if before:
                before(step, params)
            delta = merged(params)
            write(theta, base, delta)
            if best and best.done(theta, step):
                break
            try:
                losses = gradient(theta, step)
                pull_back(delta, theta, params, penalty)
                _check(params, step)
            except CalmergeError:
                if state and before is None:  # what came before is kept, unless an inner problem has moved on already
                    state.save(step)
                raise
            for group, lr in zip(optim.param_groups, rates, strict=True):
                group["lr"] = lr * (schedule(step) if schedule else 1.0)
            optim.step()
            optim.zero_grad()
            for task, loss in losses.items():
                fitted.loss.setdefault(task, []).append(loss)
            for name, value in (observe(params) if observe else {}).items():
                fitted.observed.setdefault(name, []).append(value)
            bar.advance(1, loss=sum(losses.values()))
            fitted.seconds = time.monotonic() - begun
            if state and (state.due() or step + 1 == steps):
                state.save(step + 1)
    fitted.params, fitted.step = {name: p.detach() for name, p in params.items()}, steps
    if best:
        write(theta, base, merged(fitted.params))
        best.look(theta, steps)
        fitted.params, fitted.step = best.params, best.step
    return fitted


def cosine(steps: int) -> Callable[[int], float]:
    """A schedule that falls from 1 to 0 along half a cosine over `steps` updates.

    >>> [round(cosine(4)(step), 2) for step in range(4)]
    [1.0, 0.85, 0.5, 0.15]
    """
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))


def empty(weights: Weights, device: torch.device) -> dict[str, Tensor]:
    """Room for the tensors of `weights`, float32, not initialised.

    >>> from calmerge import StateDict
    >>> empty(StateDict({"w": torch.ones(2, 3)}), torch.device("cpu"))["w"].shape
    torch.Size([2, 3])
    """
    return {name: torch.empty(spec.shape, device=device) for name, spec in weights.specs.items()}


def write(theta: Mapping[str, Tensor], base: Weights, delta: Weights) -> None:
    """theta = theta_0 + delta, written into the tensors of `theta`, whose gradients are cleared.

    >>> from calmerge import StateDict
    >>> theta = {"w": torch.empty(2)}
    >>> write(theta, StateDict({"w": torch.ones(2)}), StateDict({"w": torch.tensor([0.5, 1.0])}))
    >>> theta["w"]
    tensor([1.5000, 2.0000], requires_grad=True)
    """
    with torch.no_grad():
        for name, tensor in theta.items():
            tensor.copy_(base.read(name)).add_(delta.read(name))
            tensor.grad = None
            tensor.requires_grad_()


def pull_back(
    delta: Weights,
    theta: Mapping[str, Tensor],
    params: Params,
    penalty: Callable[[str, Params], Tensor] | None = None,
) -> None:
    """Add to the parameters' gradients what dLoss/dtheta makes of them; that of each tensor of `theta` is freed.

    >>> scale = torch.tensor(2.0, requires_grad=True)
    >>> theta = {"w": torch.zeros(2, requires_grad=True)}
    >>> theta["w"].grad = torch.tensor([1.0, 3.0])
    >>> from calmerge import StateDict
    >>> pull_back(StateDict({"w": scale * torch.ones(2)}), theta, {"scale": scale})
    >>> scale.grad
    tensor(4.)
    """
    for name, tensor in theta.items():
        terms = []
        if tensor.grad is not None:
            value = delta.read(name)
            if value.requires_grad:
                terms.append((value * tensor.grad).sum())
        if penalty is not None:
            term = penalty(name, params)
            if term.requires_grad:
                terms.append(term)
        if terms:
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        tensor.grad = None  # freed as soon as it is used


class _Best:
    """The parameters with the least held-out loss so far."""

    def __init__(self, watch: Watch, current: Params, fitted: Fitted) -> None:
        self._watch, self._current, self._fitted = watch, current, fitted
        self.params = {name: p.detach().clone() for name, p in current.items()}
        self.loss, self.step, self._waited = float("inf"), 0, 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs."""
        return {"params": self.params, "loss": self.loss, "step": self.step, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.params, self.loss, self.step = state["params"], state["loss"], state["step"]
        self._waited = state["waited"]

    def done(self, theta: Mapping[str, Tensor], step: int) -> bool:
        """Whether the fit should end; looks every so many updates."""
        if step % self._watch.every == 0:
            self.look(theta, step)
        return self._waited >= self._watch.patience

    def look(self, theta: Mapping[str, Tensor], step: int) -> None:
        """Compare the held-out loss at `theta` with the best one, and keep the parameters where it is lower."""
        if self._waited >= self._watch.patience:
            return
        loss = self._watch.loss(theta)
        self._fitted.watched.append(loss)
        if loss < self.loss:
            self.loss, self.step, self._waited = loss, step, 0
            for name, p in self._current.items():
                self.params[name].copy_(p.detach())
        else:
            self._waited += 1


def _check(params: Params, step: int) -> None:
    for name, p in params.items():
        # a sum is finite only if all its terms are, and is quick; the exact test runs only where it overflows
        if p.grad is not None and not torch.isfinite(p.grad.sum()) and not torch.isfinite(p.grad).all():
            raise FitError(
                f"update {step + 1}: the gradient of '{name}' is not finite. A smaller step size, or float32 instead "
                "of a lower precision, keeps it finite."
            )


class _State:
    """A fit on disk, from which an interrupted one goes on.

    Args:
        path: its file.
        key: describes everything that decides the result.
        params: the parameters, which `load` fills.
        stateful: by name, what else moves.
        fitted: what was seen on the way.
    """

    def __init__(self, path: Path, key: str, params: Params, stateful: Mapping[str, Stateful], fitted: Fitted) -> None:
        self._path, self._key = path, key
        self._params, self._stateful, self._fitted = params, stateful, fitted
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > SAVE_EVERY

    def save(self, step: int) -> None:
        """Write everything after `step` updates, all or nothing."""
        fitted = self._fitted
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        torch.save(
            {
                "key": self._key,
                "params": dict(self._params),
                "stateful": {name: one.state_dict() for name, one in self._stateful.items()},
                "loss": fitted.loss,
                "observed": fitted.observed,
                "watched": fitted.watched,
                "step": step,
                "seconds": fitted.seconds,
            },
            partial,
        )
        os.replace(partial, self._path)
        self._saved = time.monotonic()

    def load(self, steps: int) -> int:
        """How many updates the saved state has seen, 0 where there is none; everything else goes where it was.

        Raises:
            UsageError: it belongs to other settings, or is further than `steps`.
        """
        if not self._path.is_file():
            return 0
        state, fitted, folder = torch.load(self._path, weights_only=True), self._fitted, self._path.parent
        if state["key"] != self._key:
            raise UsageError(f"{folder} holds the state of another run. Name another folder, or delete this one.")
        if state["step"] > steps:
            raise UsageError(
                f"{folder} holds the state after {state['step']} updates, more than the {steps} asked for. "
                "Name another folder, or delete this one."
            )
        with torch.no_grad():
            for name, p in self._params.items():
                p.copy_(state["params"][name])
        for name, one in self._stateful.items():
            one.load_state_dict(state["stateful"][name])
        fitted.loss, fitted.observed, fitted.watched = state["loss"], state["observed"], state["watched"]
        fitted.seconds = state["seconds"]
        return int(state["step"])
