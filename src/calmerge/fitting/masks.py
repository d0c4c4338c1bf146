"""One binary mask between a running merge and a new expert, optimised against all tasks seen so far.

The third part of CALM (Yan et al., ICML 2025), usable for any two vectors; `calmerge.methods.calm` has the formulas.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmerge._checkpoint import open_checkpoint
from calmerge._errors import UsageError
from calmerge._measure import kth_magnitude
from calmerge._run import Run
from calmerge._task_vectors import materialise
from calmerge._weights import Computed, Site, StateDict, Weights
from calmerge.fitting.fit import Fitted, Params, empty, fit, write
from calmerge.fitting.objectives import pseudo_label
from calmerge.pieces.mask import load_masks, save_masks, top_fraction
from calmerge.report.traces import CalmStage, Density, Histogram
from calmerge.tasks.base import Batch, Batches, Gradient, Tasks

Regulariser = Literal["binarise", "l1"]


class Search(NamedTuple):
    """How a mask is optimised; `calm` has arguments of the same names."""

    lr: float | Literal["auto"]
    share: float
    steps: int
    batch: int
    batches: int
    regulariser: Regulariser
    alpha: float
    top: float
    logit: float
    frozen: tuple[str, ...]
    rest: Literal["average", "copy"]
    seed: int


def flip_threshold(steps: int, *, logit: float = 5.0, alpha: float = 1.0) -> float:
    """The least constant force F = -lr G d that turns a logit of -logit positive within `steps` updates.

    m <- m + (F - alpha) sigma'(m), about F = alpha + 147 / steps for logit 5; and 0.1 % on top, since updates are made
    in float32, where rounding would decide about an entry that feels exactly this force.

    >>> round(flip_threshold(100), 2), round(flip_threshold(1))
    (2.62, 754)
    """

    def flips(force: float) -> bool:
        m = torch.tensor(-logit, dtype=torch.float64)
        for _ in range(steps):
            s = m.sigmoid()
            m = m + (force - alpha) * s * (1 - s)
            if m > 0:
                return True
        return False

    low, high = alpha, alpha + 2.0
    while not flips(high):
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if flips(middle) else (middle, high)
    return high * 1.001


def consensus_mask(
    tau_u: Weights,
    tau_k: Weights,
    base: Weights,
    tasks: Tasks,
    seen: Sequence[str],
    draw: Batches,
    search: Search,
    *,
    run: Run,
    key: str,
) -> tuple[Weights, dict[str, Tensor], CalmStage]:
    """The merge after one more expert, the binary mask that says which entries came from it, and the record.

    Args:
        tau_u: the running merged vector.
        tau_k: the new expert's.
        base: theta_0.
        tasks: the model and its pools.
        seen: all tasks in the loss, the new one last.
        draw: the batches of every update.
        search: how the mask is optimised.
        run: progress, and the folder where a finished stage is kept.
        key: describes everything that decides the result.
    """
    if run.folder and (run.folder / "record.json").is_file():
        return _finished(run.folder, key, list(tau_u), tasks.device)
    gradient = tasks.gradient(pseudo_label, draw)
    names = _maskable(tau_u, base, tasks, draw, search)
    logits = start_logits(tau_k, names, top=search.top, logit=search.logit)
    threshold = flip_threshold(search.steps, logit=search.logit, alpha=search.alpha)
    soft = partial(_soft, tau_u, tau_k, search.rest)
    lr, histogram = _step_size(soft(logits), tau_u, tau_k, base, gradient, names, search, threshold, tasks.device)
    fitted = fit(
        soft,
        logits,
        gradient,
        base=base,
        optimizer=partial(torch.optim.SGD, lr=lr),
        steps=search.steps,
        penalty=partial(_penalty, search.regulariser, search.alpha / lr),
        observe=_flips(logits),
        run=run,
        label=f"CALM {seen[-1]}",
        key=key,
    )
    mask = {name: m > 0 for name, m in fitted.params.items()}
    merged = materialise(_hard(tau_u, tau_k, mask, search.rest))
    record = _record(seen, lr, threshold, fitted, mask, histogram)
    if run.folder:
        _finish(run.folder, key, merged, mask, record)
    return merged, mask, record


def _flips(start: Params) -> Callable[[Params], dict[str, float]]:
    """An observer that counts the entries whose rounded mask changed since it last looked."""
    on = {name: m > 0 for name, m in start.items()}

    def count(logits: Params) -> dict[str, float]:
        changed = 0
        for name, m in logits.items():
            now = m > 0
            changed += int((now != on[name]).sum())
            on[name] = now
        return {"flips": changed}

    return count


def _record(
    seen: Sequence[str],
    lr: float,
    threshold: float,
    fitted: Fitted,
    mask: Mapping[str, Tensor],
    histogram: Histogram,
) -> CalmStage:
    entries = sum(m.numel() for m in mask.values())
    shares = {name: m.float().mean().item() for name, m in mask.items() if m.numel()}
    return CalmStage(
        task=seen[-1],
        seen=list(seen),
        lr=lr,
        threshold=threshold,
        loss=fitted.loss,
        flips=[int(n) for n in fitted.observed["flips"]],
        taken=sum(int(m.sum()) for m in mask.values()) / max(entries, 1),
        density=[Density(name=n, share=share, entries=mask[n].numel()) for n, share in shares.items()],
        histogram=histogram,
        entries=entries,
    )


def start_logits(tau_k: Weights, names: Sequence[str], *, top: float, logit: float) -> Weights:
    """One logit for each entry: `logit` where |tau_k| exceeds its floor(top * N)-th largest, else -`logit`.

    >>> tvs = task_vectors({"w": torch.zeros(4)}, {"a": {"w": torch.tensor([1.0, -4.0, 3.0, 2.0])}})
    >>> start_logits(tvs.of("a"), ["w"], top=0.5, logit=5.0)["w"]
    tensor([-5.,  5., -5., -5.])
    """
    maskable = tau_k.only_names(names)
    threshold = top_fraction(maskable, top)
    return maskable.map(lambda tau, site: torch.where(tau.abs() > threshold, logit, -logit))


def _soft(tau_u: Weights, tau_k: Weights, rest: str, logits: Params) -> Weights:
    def mixed(u: Tensor, k: Tensor, site: Site) -> Tensor:
        if site.name not in logits:
            return _unmasked(u, k, rest)
        return u + logits[site.name].sigmoid() * (k - u)

    return _pairwise(tau_u, tau_k, mixed)


def _hard(tau_u: Weights, tau_k: Weights, mask: Mapping[str, Tensor], rest: str) -> Weights:
    def chosen(u: Tensor, k: Tensor, site: Site) -> Tensor:
        return torch.where(mask[site.name], k, u) if site.name in mask else _unmasked(u, k, rest)

    return _pairwise(tau_u, tau_k, chosen)


def _unmasked(u: Tensor, k: Tensor, rest: str) -> Tensor:
    return u if rest == "copy" else 0.5 * (u + k)


def _penalty(regulariser: Regulariser, weight: float, name: str, logits: Params) -> Tensor:
    """-w sum |sigma(m) - 1/2| or w sum sigma(m), whose SGD step is alpha s(m) sigma'(m); w = alpha / lr."""
    if name not in logits:
        return torch.zeros(())
    m = logits[name]
    sign = torch.ones_like(m) if regulariser == "l1" else torch.where(m > 0, -1.0, 1.0)
    return weight * (sign * m.sigmoid()).sum()


def _maskable(tau_u: Weights, base: Weights, tasks: Tasks, draw: Batches, search: Search) -> list[str]:
    """The tensors that get a mask: not named as frozen, and reached by the loss of some task."""
    theta = empty(tau_u, tasks.device)
    write(theta, base, tau_u)

    def taste(step: int) -> Iterator[Batch]:
        tasted = set()
        for batch in draw(step):
            if batch.task not in tasted:
                tasted.add(batch.task)
                yield Batch(batch.task, batch.indices[:2], None if batch.targets is None else batch.targets[:2])

    tasks.gradient(pseudo_label, taste)(theta, 0)
    return [
        name
        for name, tensor in theta.items()
        if tensor.grad is not None and not any(fnmatchcase(name, pattern) for pattern in search.frozen)
    ]


def _step_size(
    delta: Weights,
    tau_u: Weights,
    tau_k: Weights,
    base: Weights,
    gradient: Gradient,
    names: Sequence[str],
    search: Search,
    threshold: float,
    device: torch.device,
) -> tuple[float, Histogram]:
    """The step size, and the distribution of the force F = -lr G d that the first gradient puts on the entries."""
    theta = empty(delta, device)
    write(theta, base, delta)
    gradient(theta, 0)
    force = {}
    for name in names:
        grad = theta[name].grad
        assert grad is not None
        force[name] = grad.mul_(tau_u.read(name) - tau_k.read(name))  # -G d, in the gradient's place
    theta.clear()
    lr = auto_step_size(StateDict(force), search.share, threshold) if search.lr == "auto" else search.lr
    return lr, _histogram(force, lr)


def auto_step_size(force: Weights, share: float, threshold: float) -> float:
    """The step size at which the share `share` of all entries feels at least `threshold`: threshold / quantile(-G d).

    Where fewer entries than that have a positive -G d, the largest of all reaches the threshold.

    >>> auto_step_size(StateDict({"w": torch.tensor([4.0, -8.0, 1.0, 2.0])}), 0.5, 3.0)
    1.5
    """
    positive = force.map(lambda f, site: f.clamp(min=0))
    n = positive.numel
    for k in (max(1, int(share * n)), 1):
        quantile = float(kth_magnitude(positive, n - k + 1).value()[0]) if n else 0.0
        if quantile > 0:
            return threshold / quantile
    return 1.0


def _histogram(force: Mapping[str, Tensor], lr: float) -> Histogram:
    edges = [10 ** (i / 4) for i in range(-16, 17)]
    inner = torch.tensor(edges[1:-1])
    counts, non_positive = torch.zeros(len(edges) - 1, dtype=torch.int64), 0
    for f in force.values():
        scaled = (f.flatten() * lr).cpu()
        positive = scaled[scaled > 0]
        non_positive += len(scaled) - len(positive)
        counts += torch.bincount(torch.bucketize(positive, inner, right=True), minlength=len(edges) - 1)
    return Histogram(edges=edges, counts=counts.tolist(), non_positive=non_positive)


def _pairwise(tau_u: Weights, tau_k: Weights, fn: Callable[[Tensor, Tensor, Site], Tensor]) -> Weights:
    return Computed(fn, (tau_u, tau_k), tau_u.specs, elementwise=False)


def _finish(folder: Path, key: str, merged: Weights, mask: Mapping[str, Tensor], record: CalmStage) -> None:
    """Keep a stage: the vector and the mask first, then, by rename, the record that says they are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: w.contiguous() for n, w in merged.items()}, folder / "merged.safetensors")
    save_masks(folder / "mask.safetensors", mask)
    (folder / "record.partial").write_text(json.dumps({"key": key, "record": record.model_dump(mode="json")}))
    os.replace(folder / "record.partial", folder / "record.json")


def _finished(
    folder: Path, key: str, names: Sequence[str], device: torch.device
) -> tuple[Weights, dict[str, Tensor], CalmStage]:
    """A stage that was kept, with its tensors in the model's order (a file has its own)."""
    kept = json.loads((folder / "record.json").read_text())
    if kept["key"] != key:
        raise UsageError(f"{folder} holds the state of another run. Name another folder, or delete this one.")
    kept_vector = open_checkpoint(folder / "merged.safetensors").only_names(names)
    merged = materialise(kept_vector.map(lambda w, site: w.to(device)))
    masks = load_masks(folder / "mask.safetensors")
    return merged, {n: masks[n] for n in names if n in masks}, CalmStage.model_validate(kept["record"])
