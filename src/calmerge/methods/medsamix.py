"""MedSAMix: a method and its numbers for every group of layers, found by search (Yang et al., 2025)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from calmerge._errors import UsageError, did_you_mean
from calmerge._layers import layers
from calmerge._run import Run
from calmerge._signature import Count, NonNegative, Seed, check, raise_together
from calmerge._task_vectors import Stacked, TaskVectors
from calmerge._weights import Gathered, Site, Weights
from calmerge.fitting.scores import ScoreName, scorer
from calmerge.fitting.search import Choice, Range, Space, Strategy, Value, search
from calmerge.methods.map_front import preferences
from calmerge.methods.searched import traced
from calmerge.methods.slerp import slerp
from calmerge.methods.task_arithmetic import task_arithmetic
from calmerge.methods.ties import ties
from calmerge.pieces.weigh import weigh
from calmerge.tasks.base import Tasks

Split = Literal["unified", "separate"]
_METHODS = ("linear", "task_arithmetic", "ties", "slerp")
_SCALES = (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)  # of the official initial design
_BASE = "(base)"  # what no expert can be called
_UNIT = Range(0.0, 1.0)


def medsamix(
    tvs: TaskVectors,
    *,
    tasks: Tasks,
    groups: Mapping[str, Sequence[str]] | None = None,
    blocks: Count = 2,
    components: Split = "unified",
    objectives: Literal["mean", "each"] = "mean",
    preference: Mapping[str, NonNegative] | None = None,
    score: ScoreName = "validation",
    strategy: Strategy = "tpe",
    budget: Count = 200,
    examples: Count = 256,
    seed: Seed = 0,
    run: Run | None = None,
) -> Weights:
    """The merge that has, for every group of layers, the method and the numbers which scored best of those tried.

    argmax of sum_t v_t score_t(theta) over recipes that choose for each group: `linear`, sum_m w_m theta_m / sum_m w_m
    over base and experts; `task_arithmetic`, theta_0 + s sum_t tau_t; `ties` with the share r of each tensor trimmed
    and the scale s; or `slerp` between the two models of highest score a, at t = exp(a_2) / (exp(a_1) + exp(a_2)).

    Args:
        tvs: task vectors of T experts.
        tasks: the model, its frozen heads, and the data of the score.
        groups: shell patterns of tensors by name of a group; a tensor is in the first that fits, and as in the base
            where none does. When None, neighbouring blocks of a stack form a group, and of what is outside of stacks
            each module.
        blocks: how many blocks of a stack form a group, where `groups` is None; the last one may have fewer.
        components: whether the blocks of a group have one method, or attention, norms and the rest one each.
        objectives: whether the `mean` of the tasks' scores is searched for, or a front of trade-offs, `each` of them
            being an objective.
        preference: v, by task, those not named 0; all equal when None. It weighs the mean, or picks from the front.
        score: accuracy on the labelled `validation` splits as in the paper, or what needs no labels; see
            `calmerge.fitting.scores`.
        strategy: as in `calmerge.fitting.search.search`; of those for several objectives where `each` is one.
        budget: number of merges tried.
        examples: of each pool, how many a label-free score looks at.
        seed: decides what is tried, and on which examples.
        run: progress, the journal from which a stopped search goes on, and the trace with all trials.

    Held in memory: one merged model.

    Raises:
        UsageError: a pattern that fits no tensor, an empty group, a preference for an unknown task or for none.
        DataError: a split that the score needs is missing.
        FitError: no trial had a finite score.
        MissingExtra: optuna is not installed.

    >>> import inspect
    >>> inspect.signature(medsamix).parameters["budget"].default
    200

    Source: Yang, Su, et al., "MedSAMix: A Training-Free Model Merging Approach for Medical Image Segmentation", arXiv
    2025 (2508.11032); podismine/MedSAMix (Apache-2.0).
    Differences: TPE of optuna in place of SMAC's random forest, and one fidelity, since the official evaluator ignores
    the other; of three equal initial designs one is tried; blocks that are left over form a group, weights that are all
    0 give the base, and a trial that fails counts as the worst (officially: a division by 0, and an end of the run);
    ties as in `ties` with `scope="tensor"`, where a sum of 0 takes the majority sign of the group.
    """
    options: dict[str, Any] = {
        "tasks": tasks,
        "groups": groups,
        "blocks": blocks,
        "components": components,
        "objectives": objectives,
    }
    options |= {"preference": preference, "score": score, "strategy": strategy, "budget": budget}
    raise_together(check(medsamix, options | {"examples": examples, "seed": seed}))
    run, tvs, names = run or Run(), tvs.to(tasks.device), tvs.tasks
    v = preferences(preference, names)
    found = _listed(tvs.specs, groups) if groups else grouped(tvs, blocks=blocks, components=components)
    scores = scorer(tvs, tasks, score, examples=examples, seed=seed, run=run)

    def told(values: Mapping[str, Value]) -> float | list[float]:
        seen = scores(merged(tvs, found, values))
        return [seen[t] for t in names] if objectives == "each" else _weighted(v, [seen[t] for t in names])

    done = search(
        told, space(found, names), strategy=strategy, budget=budget, seed=seed, start=list(designs(found, names)),
        objectives=len(names) if objectives == "each" else 1, run=run, label="medsamix",
        key=f"{found} {score} {examples} {v} {tvs.fingerprint}",
    )  # fmt: skip
    best = max(done.front, key=lambda trial: _weighted(v, trial.scores or ())) if objectives == "each" else done.best
    run.trace["medsamix"] = traced(done, score, strategy, best)
    return merged(tvs, found, best.values)


def grouped(tvs: TaskVectors, *, blocks: int = 2, components: Split = "unified") -> dict[str, list[str]]:
    """The tensors by group: neighbouring blocks of a stack, and of what is outside of stacks each module.

    >>> from calmerge import task_vectors
    >>> names = ["embed.weight", *(f"h.{i}.{m}.weight" for i in range(3) for m in ("attn", "norm"))]
    >>> base = {name: torch.zeros(1) for name in names}
    >>> tvs = task_vectors(base, {"a": {name: torch.ones(1) for name in base}})
    >>> list(grouped(tvs)), list(grouped(tvs, blocks=3, components="separate"))
    (['embed', 'h 0-1', 'h 2'], ['embed', 'h 0-2 attention', 'h 0-2 norm'])
    """
    depth = layers(tvs.base.specs)
    found: dict[str, list[str]] = {}
    for name in sorted(tvs.specs):  # in whatever order a file has them, the same search
        at = depth.get(name)
        if at is None:
            label = ".".join(name.split(".")[:-1][:2]) or name
        else:
            first = at.index // blocks * blocks
            last = min(first + blocks, at.count) - 1
            label = f"{at.stack} {first}-{last}" if last > first else f"{at.stack} {first}"
            if components == "separate":
                label += f" {_component(name)}"
        found.setdefault(label, []).append(name)
    return found


def space(groups: Iterable[str], tasks: Sequence[str]) -> Space:
    """What may be chosen in every group: a method, and 2 T + 5 numbers in [0, 1].

    >>> len(space(["a", "b"], ["x", "y", "z"]))
    24
    """
    models = [_BASE, *tasks]
    found: dict[str, Range | Choice] = {}
    for group in groups:
        found[f"{group}: method"] = Choice(_METHODS)
        found |= {f"{group}: weight {m}": _UNIT for m in models} | {f"{group}: score {m}": _UNIT for m in models}
        found |= {f"{group}: scale": _UNIT, f"{group}: ties scale": _UNIT, f"{group}: trim": Range(0.0, 0.99)}
    return found


def designs(groups: Iterable[str], tasks: Sequence[str]) -> Iterator[dict[str, Value]]:
    """What is tried first, the same in all groups: each model alone, slerp, Task Arithmetic and TIES at some scales.

    >>> len(list(designs(["a"], ["x", "y", "z"])))
    17
    """
    groups, models = list(groups), [_BASE, *tasks]
    for alone in models:
        yield _everywhere(groups, {"method": "linear"} | {f"weight {m}": float(m == alone) for m in models})
    yield _everywhere(groups, {"method": "slerp"} | {f"score {m}": 0.5 for m in models})
    for scale in _SCALES:
        yield _everywhere(groups, {"method": "task_arithmetic", "scale": scale})
    for scale in _SCALES:
        yield _everywhere(groups, {"method": "ties", "ties scale": scale, "trim": 0.2})


def merged(tvs: TaskVectors, groups: Mapping[str, Sequence[str]], values: Mapping[str, Value]) -> Weights:
    """The delta of a recipe, each group with its method and its numbers.

    >>> from calmerge import task_vectors
    >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.tensor([4.0])}, "b": {"w": torch.tensor([8.0])}})
    >>> weights = {"g: weight (base)": 1.0, "g: weight a": 1.0, "g: weight b": 2.0}
    >>> merged(tvs, {"g": ["w"]}, {"g: method": "linear"} | weights)["w"]
    tensor([5.])
    """
    parts: dict[str, tuple[Weights, str]] = {}
    for group, names in groups.items():
        own = {key.removeprefix(f"{group}: "): value for key, value in values.items() if key.startswith(f"{group}: ")}
        delta = _one(tvs.only_names(names), own)
        parts |= {name: (delta, name) for name in names}
    return Gathered({name: parts[name] for name in tvs.specs if name in parts})


def _one(tvs: TaskVectors, values: Mapping[str, Any]) -> Weights:
    """The delta of one group."""
    models = [_BASE, *tvs.tasks]
    if values["method"] == "task_arithmetic":
        return task_arithmetic(tvs, scale=values["scale"])
    if values["method"] == "ties":
        return ties(tvs, keep=1 - values["trim"], scope="tensor", scale=values["ties scale"])
    if values["method"] == "linear":
        whole = sum(values[f"weight {m}"] for m in models) or 1.0  # all 0: the base
        return task_arithmetic(weigh(tvs, weights={t: values[f"weight {t}"] / whole for t in tvs.tasks}), scale=1.0)
    first, second = sorted(models, key=lambda m: -values[f"score {m}"])[:2]
    t = torch.tensor([values[f"score {first}"], values[f"score {second}"]]).softmax(0)[1]
    return slerp(_beside_base(tvs).only([first, second]), t=float(t))


def _beside_base(tvs: TaskVectors) -> TaskVectors:
    """The task vectors with that of the base, which is 0, in front."""

    def joined(tau: Tensor, site: Site) -> Tensor:
        return torch.cat([torch.zeros_like(tau[:1]), tau])

    models = {_BASE: tvs.base, **tvs.experts}
    return TaskVectors(Stacked(joined, (tvs,), tvs.specs), list(models), tvs.base, experts=models)


def _listed(names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The tensors by group, each in the first one that has a pattern which fits."""
    left, found = list(names), dict[str, list[str]]()
    for group, patterns in groups.items():
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(f"medsamix.groups: '{pattern}' fits no tensor. {did_you_mean(pattern, names)}")
        found[group] = [name for name in left if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not found[group]:
            raise UsageError(f"medsamix.groups: nothing is left for '{group}'; groups before it have its tensors.")
        gone = set(found[group])
        left = [name for name in left if name not in gone]
    return found


def _component(name: str) -> str:
    """`attention`, `norm` or `mlp`, by the parts of a name; a norm inside of attention is a norm."""
    parts = name.lower().split(".")[:-1]
    if parts and ("norm" in parts[-1] or parts[-1].startswith("ln")):
        return "norm"
    return "attention" if any("attn" in part or "attention" in part for part in parts) else "mlp"


def _everywhere(groups: Iterable[str], values: Mapping[str, Value]) -> dict[str, Value]:
    return {f"{group}: {key}": value for group in groups for key, value in values.items()}


def _weighted(v: Sequence[float], scores: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(v, scores, strict=True)) / sum(v)
