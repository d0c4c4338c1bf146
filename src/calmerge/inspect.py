"""What task vectors have in common: norms, angles, sign conflicts, unmoved tensors, and signs of a wrong base."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calmerge._run import Run
from calmerge._task_vectors import TaskVectors
from calmerge._weights import blocks

if TYPE_CHECKING:
    from calmerge.report.results import Analysis

FAR = 0.5
"""A task vector longer than this share of the base makes one doubt that the base is the right one."""
TURNED = 0.9
"""Weights of an expert at a cosine below this to the base's are as doubtful."""
SAME = 0.9999


@dataclass(frozen=True)
class Inspection:
    """Statistics over all merged tensors together, in float64; matrices follow the order of `tasks`.

    Attributes:
        tasks: the experts' names.
        entries: how many entries of one model are merged.
        base_norm: |theta_0|.
        norms: |tau_t| by task.
        relative: |tau_t| / |theta_0| by task; 0 for a base that is 0.
        base_cosines: cosine between theta_t and theta_0 by task.
        cosines: [T, T], cos(tau_s, tau_t); 0 where one of the two is 0.
        sign_conflicts: [T, T], share of entries with opposite signs among those where neither task vector is 0.
        zeros: share of exactly zero entries by task.
        tensor_norms: by tensor, |tau_t| for every task.
        untouched: tensors that no expert changed.
        frozen: by task, tensors which that expert left as they were although another changed them.
        heads: by task, the shapes of the tensors it has for itself.
        skipped: tensors that are not merged, with the reason.
        warnings: sentences on what looks wrong.
    """

    tasks: tuple[str, ...]
    entries: int
    base_norm: float
    norms: dict[str, float]
    relative: dict[str, float]
    base_cosines: dict[str, float]
    cosines: list[list[float]]
    sign_conflicts: list[list[float]]
    zeros: dict[str, float]
    tensor_norms: dict[str, list[float]]
    untouched: tuple[str, ...]
    frozen: dict[str, tuple[str, ...]]
    heads: dict[str, dict[str, tuple[int, ...]]]
    skipped: dict[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def analysis(self) -> "Analysis":
        """The part of this that a report shows."""
        from calmerge.report.results import Analysis, LeftOut

        return Analysis(
            tasks=list(self.tasks),
            norms=self.norms,
            cosines=self.cosines,
            sign_conflicts=self.sign_conflicts,
            left_out=[
                LeftOut(name=name, action="excluded" if reason.startswith("excluded") else "copied", reason=reason)
                for name, reason in self.skipped.items()
            ],
        )


def inspect_task_vectors(tvs: TaskVectors, *, run: Run | None = None) -> Inspection:
    """Norms, cosines and sign conflicts of task vectors, from one pass over all tensors.

    cos(s, t) = tau_s . tau_t / (|tau_s| |tau_t|);
    conflict(s, t) = #{p: tau_s,p tau_t,p < 0} / #{p: tau_s,p tau_t,p != 0}.

    Args:
        tvs: task vectors of T experts. One block of [T + 1, rows] is held at a time.
        run: progress in bytes.

    Raises:
        CheckpointError: a checkpoint holds NaN or infinite entries.

    >>> from calmerge import task_vectors
    >>> experts = {"a": {"w": torch.tensor([4.0, 4.0])}, "b": {"w": torch.tensor([4.0, 2.0])}}
    >>> found = inspect_task_vectors(task_vectors({"w": torch.tensor([4.0, 3.0])}, experts))
    >>> found.norms, found.cosines[0][1], found.sign_conflicts[0][1]
    ({'a': 1.0, 'b': 1.0}, -1.0, 1.0)
    """
    run = run or Run()
    n = len(tvs.tasks)
    gram, along, base_square = _zeros(n, n), _zeros(n), _zeros()
    both, agreeing, zeros = _zeros(n, n), _zeros(n, n), _zeros(n)
    squares: dict[str, Tensor] = {}
    with run.progress.track("inspecting", sum(4 * (n + 1) * s.numel for s in tvs.specs.values()), "B") as bar:
        for name, rows in blocks(tvs):
            tau = tvs.read(name, rows).reshape(n, -1)
            base = tvs.base.read(name, rows).reshape(-1).double()
            wide, sign = tau.double(), tau.sign()
            products = wide @ wide.T
            squares[name] = squares.get(name, _zeros(n)) + products.diagonal()
            gram += products
            along += wide @ base
            base_square += base @ base
            both += (sign.abs() @ sign.abs().T).double()
            agreeing += (sign @ sign.T).double()
            zeros += (tau == 0).sum(1)
            bar.advance(4 * (n + 1) * base.numel())
    return _found(tvs, gram, along, base_square, both, agreeing, zeros, squares)


def _found(
    tvs: TaskVectors,
    gram: Tensor,
    along: Tensor,
    base_square: Tensor,
    both: Tensor,
    agreeing: Tensor,
    zeros: Tensor,
    squares: dict[str, Tensor],
) -> Inspection:
    norms, base_norm = gram.diagonal().sqrt(), base_square.sqrt()
    expert_norms = (base_square + 2 * along + gram.diagonal()).clamp_min(0).sqrt()
    cosines = _ratio(gram, norms[:, None] * norms).clamp(-1, 1)
    base_cosines = _ratio(base_square + along, base_norm * expert_norms).clamp(-1, 1)
    relative = _ratio(norms, base_norm.expand_as(norms))
    tensor_norms = {name: square.sqrt() for name, square in squares.items()}
    untouched = [name for name, norm in tensor_norms.items() if not norm.any()]
    frozen = {
        task: tuple(name for name, norm in tensor_norms.items() if norm[t] == 0 and norm.any())
        for t, task in enumerate(tvs.tasks)
    }
    return Inspection(
        tasks=tvs.tasks,
        entries=tvs.numel,
        base_norm=base_norm.item(),
        norms=_by_task(tvs, norms),
        relative=_by_task(tvs, relative),
        base_cosines=_by_task(tvs, base_cosines),
        cosines=cosines.tolist(),
        sign_conflicts=_ratio((both - agreeing) / 2, both).tolist(),
        zeros=_by_task(tvs, zeros / max(1, tvs.numel)),
        tensor_norms={name: norm.tolist() for name, norm in tensor_norms.items()},
        untouched=tuple(untouched),
        frozen={task: names for task, names in frozen.items() if names},
        heads={task: {name: spec.shape for name, spec in head.specs.items()} for task, head in tvs.heads.items()},
        skipped=dict(tvs.skipped),
        warnings=tuple(_warnings(tvs.tasks, norms, relative, base_cosines, cosines)),
    )


def _warnings(
    tasks: Sequence[str], norms: Tensor, relative: Tensor, base_cosines: Tensor, cosines: Tensor
) -> list[str]:
    found = []
    for t, task in enumerate(tasks):
        if norms[t] == 0:
            found.append(f"expert '{task}' is the base itself: its task vector is 0.")
        elif relative[t] > FAR or base_cosines[t] < TURNED:
            found.append(
                f"expert '{task}' is far from the base: its task vector has {relative[t]:.2f} times the base's length, "
                f"and its weights a cosine of {base_cosines[t]:.2f} to the base's. Was it fine-tuned from this base?"
            )
        for s in range(t):
            if cosines[s, t] > SAME:
                found.append(f"experts '{tasks[s]}' and '{task}' differ from the base in the same way. Is one a copy?")
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where below is 0."""
    return torch.where(below == 0, torch.zeros_like(above), above / torch.where(below == 0, 1.0, below))


def _by_task(tvs: TaskVectors, values: Tensor) -> dict[str, float]:
    return dict(zip(tvs.tasks, values.tolist(), strict=True))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)
