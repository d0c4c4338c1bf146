"""Defense-Aware Merging: masks that drop what makes a merged model easy to flip (Yang et al., ICLR 2025)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calmerge._errors import DataError
from calmerge._run import Run
from calmerge._signature import Count, Interval, NonNegative, Positive, Seed, check, raise_together
from calmerge._task_vectors import TaskVectors, materialise
from calmerge._weights import Weights
from calmerge.fitting.concrete import Draw, Evaluation, final_masks, learn_masks, masked
from calmerge.fitting.objectives import entropy
from calmerge.fitting.samplers import shuffled, whole_pools
from calmerge.methods.adamerging import learned_coefficients
from calmerge.tasks.base import Model, Tasks

Bounds = tuple[float, float]


def dam(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    masks: Literal["single", "dual"] = "single",
    safety: NonNegative = 0.1,
    trigger_lr: Positive = 1e-4,
    per: Literal["tensor", "task"] = "tensor",
    init: Annotated[float, Interval()] = 0.3,
    clamp: bool = True,
    mask_steps: Annotated[int, Interval(0)] = 1000,
    mask_lr: Positive = 1e-3,
    inner_lr: Positive = 1.0,
    steps: Annotated[int, Interval(0)] = 1000,
    lr: Positive = 1e-3,
    batch: Count = 16,
    temperature: Positive = 0.5,
    evaluation: Evaluation = "draw",
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """A merge of experts some of which may carry a backdoor, without labels and without a poisoned example.

    As Concrete AdaMerging, with one universal perturbation delta_t of each task's inputs that learns to change the
    predictions of the merged model, and masks that must be sure of disturbed inputs as well:
        delta_t <- Adam on -CE(logits(x + delta_t), argmax logits(x));
        mask's loss = sum_t H(logits(x)) + w H(logits(clip(x + delta_t))).

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and unlabelled pools; inputs must be tensors of one shape (images).
        masks: `single`, one mask for both terms (the official code), or `dual`, the product of a task-shared and a
            backdoor-detection mask that move in turn (the paper; a reconstruction).
        safety: w; 0 is Concrete AdaMerging.
        trigger_lr: step size of the perturbations.
        per: as for `concrete_adamerging`, like all that follow.
        init: start of every coefficient.
        clamp: use coefficients clamped to [0, 1].
        mask_steps: updates of the masks' logits.
        mask_lr: their step size.
        inner_lr: step size of the coefficients' one step.
        steps: updates of the coefficients in the second phase.
        lr: their step size.
        batch: inputs of each task in an update.
        temperature: of the relaxed Bernoulli distribution.
        evaluation: the fixed mask: one more `draw`, or the `expected` one.
        seed: decides which inputs and masks are drawn.
        run: progress, resumable state, and the trace.

    Held in memory: as for `concrete_adamerging` (`dual`: twice the logits, noise and moments), and T perturbations.

    Raises:
        DataError: a task of `tvs` has no pool, or its inputs cannot be disturbed (tokens, several shapes).
        FitError: a loss is not finite.

    >>> import inspect
    >>> inspect.signature(dam).parameters["safety"].default
    0.1

    Source: Yang, Tang, Shen, Guo, Wang, Cao, Zhang, Tao, "Mitigating the Backdoor Effect for Multi-Task Model Merging
    via Safety-Aware Subspace", ICLR 2025; Yangjinluan/DAM, upstream in tanganke/fusion_bench (MIT).
    Differences: disturbed inputs are clipped to the range of the task's pool, where the official code clips normalised
    images to [0, 1] and so changes them even without a perturbation. Adapts on the pool that `tasks` names.
    """
    options = {"masks": masks, "safety": safety, "trigger_lr": trigger_lr, "per": per, "init": init, "clamp": clamp}
    more = {"mask_steps": mask_steps, "mask_lr": mask_lr, "inner_lr": inner_lr, "steps": steps, "lr": lr}
    rest = {"batch": batch, "temperature": temperature, "evaluation": evaluation, "seed": seed}
    raise_together(check(dam, {"tasks": tasks, **options, **more, **rest}))
    run, tvs = run or Run(), tvs.to(tasks.device)
    draw = shuffled(whole_pools(tasks, tvs.tasks), size=batch, count=1, seed=f"{seed} concrete")
    triggers = Triggers(tvs, tasks, lr=trigger_lr) if safety else None
    clean = tasks.gradient(entropy, draw)

    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        losses = clean(theta, step)
        if triggers and step % 2:  # the inner step of the coefficients sees clean inputs alone
            scale = dict.fromkeys(tvs.tasks, safety)
            found = triggers.tasks.gradient(entropy, draw, scale=scale)(theta, step)
            losses = {t: loss + safety * found[t] for t, loss in losses.items()}
        return losses

    parts = ["mask"] if masks == "single" else ["shared", "backdoor"]
    shape = (len(tvs.tasks), len(tvs)) if per == "tensor" else (len(tvs.tasks),)
    fitted = learn_masks(
        tvs,
        parts,
        torch.full(shape, init, device=tasks.device),
        gradient,
        Draw(temperature, mask_steps, mask_lr, inner_lr, seed),
        inner=True,
        clamp=clamp,
        after_inner=(lambda step, theta: triggers.move(theta, draw, step)) if triggers else None,
        companions={"triggers": triggers} if triggers else None,
        run=run,
        label="DAM",
        key=f"{options}{more}{rest}{tvs.fingerprint}",
    )
    product = final_masks(fitted.params, temperature=temperature, evaluation=evaluation, seed=seed)
    delta = learned_coefficients(
        masked(tvs, product), tasks, tvs.tasks, per=per, init=init, clamp=clamp, steps=steps, lr=lr, batch=batch,
        batches=1, seed=seed, run=run, label="dam",
    )  # fmt: skip
    return materialise(delta)


def attack_success_rate(predicted: Tensor, labels: Tensor, target: int) -> float:
    """The share of triggered examples predicted as the attacker's target, among those whose class is another one.

    Args:
        predicted: classes that the model gives to triggered examples, [n].
        labels: their true classes, [n].
        target: the class that the trigger is to bring about.

    >>> attack_success_rate(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 1, 0, 0]), target=1)
    0.6666666666666666
    """
    others = labels != target
    return float((predicted[others] == target).double().mean()) if others.any() else 0.0


class Triggers:
    """One universal perturbation of each task's inputs, which learns to change a model's predictions.

    Attributes:
        tasks: the tasks as the model does them on disturbed inputs.
    """

    def __init__(self, tvs: TaskVectors, tasks: Tasks, *, lr: float) -> None:
        shapes = {t: _pixels(tasks.split(t, "pool").batch(torch.arange(1))[0], t) for t in tvs.tasks}
        self._clean = tasks
        self._deltas = {t: torch.zeros(x.shape[1:], device=tasks.device, requires_grad=True) for t, x in shapes.items()}
        self._adam = torch.optim.Adam(list(self._deltas.values()), lr=lr)
        bounds = {t: _bounds(tasks, t) for t in tvs.tasks}
        self.tasks = tasks.with_model(_Disturbed(tasks.model, self._deltas, bounds))

    def move(self, theta: Mapping[str, Tensor], draw: Any, step: int) -> None:
        """One step of every perturbation away from the predictions on clean inputs, at fixed weights."""
        for task, indices, _ in draw(2 * step + 1):
            inputs, _ = self._clean.split(task, "pool").batch(indices)
            with torch.no_grad():
                label = self._clean.model.logits(theta, inputs, task).argmax(1)
            moved = _with_pixels(inputs, _pixels(inputs, task).to(label.device) + self._deltas[task])
            (-cross_entropy(self._clean.model.logits(theta, moved, task), label)).backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self._adam.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs."""
        return {"deltas": {t: d.detach() for t, d in self._deltas.items()}, "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for task, delta in self._deltas.items():
            delta.data.copy_(state["deltas"][task])
        self._adam.load_state_dict(state["adam"])


class _Disturbed:
    """A model whose inputs are moved by a perturbation and clipped."""

    def __init__(self, model: Model, deltas: Mapping[str, Tensor], bounds: Mapping[str, Bounds]) -> None:
        self._model, self._deltas, self._bounds = model, deltas, bounds

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        x = _pixels(inputs, task) + self._deltas[task].detach()
        return self._model.logits(weights, _with_pixels(inputs, x.clamp(*self._bounds[task])), task)


def _pixels(inputs: Any, task: str) -> Tensor:
    """The one floating tensor among the inputs of a batch."""
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    floating = [x for x in parts if isinstance(x, Tensor) and x.is_floating_point()]
    if len(floating) != 1:
        raise DataError(
            f"task '{task}': its inputs hold {len(floating)} floating tensors, and a perturbation needs just one "
            "(images). Use concrete_adamerging, which disturbs nothing."
        )
    return floating[0]


def _with_pixels(inputs: Any, x: Tensor) -> Any:
    if not isinstance(inputs, Mapping):
        return x
    return {k: x if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _bounds(tasks: Tasks, task: str) -> Bounds:
    """The least and the largest value of the task's inputs."""
    examples = tasks.split(task, "pool")
    low, high = torch.inf, -torch.inf
    for i in range(0, len(examples), tasks.batch):
        x = _pixels(examples.batch(torch.arange(i, min(i + tasks.batch, len(examples))))[0], task)
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    return low, high
