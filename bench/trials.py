"""What stands beside the factorial: whole methods under other orders, pools, experts, heads and numbers of tasks.

    python bench/trials.py SUITE DESIGN --out docs/experiments       # goes on where it was interrupted

A trial runs one entry of the league with the suite's options, and is scored on the *validation* split, as in
`flagship.py`. DESIGN is one of the functions below: `orders` (E2), `pools`, `splits`, `mixing` and `fills` (E3),
`bad_experts` (E4), `heads` (E5), `batches`, `counts` and others.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from flagship import Bench, asked
from torch import Tensor

import calmerge as cm
from calmerge._entries import ENTRIES, filled
from calmerge._merged import Merged
from calmerge._random import permutation
from calmerge._task_vectors import materialise
from calmerge._weights import StateDict
from calmerge._yaml import Data
from calmerge.league import merge_pipe
from calmerge.suites.suite import load_suite
from calmerge.tasks.base import Examples, Outputs, Tasks
from calmerge.tasks.mixing import Mixed
from calmerge.tasks.parted import Chosen
from calmerge.tasks.serving import serving

PIPES: Mapping[str, Data] = {
    **{name: entry.merge for name, entry in ENTRIES.items()},
    "calm_tsv_m": {"calm": {"inner": "tsv_m"}},
    "distillation_fast": {"distillation": {"inner": "tsv_m", "lr": 1e-3}},
    "wudi_relative": {"wudi": {"lr": "relative"}},
    "adarank_raised": {"adarank": {"lr": 0.00833}},
    "frank_wolfe_soft_raised": {"frank_wolfe_soft": {"lr": 0.0417}},
    "concrete_task_arithmetic_raised": {"concrete_task_arithmetic": {"lr": 0.0167}},
    "concrete_adamerging_raised": {"concrete_adamerging": {"mask_lr": 0.0333, "lr": 0.0167}},
    "realign_average": {"realign_heads": {"inner": "average"}},
    "realign_tsv_m": {"realign_heads": {"inner": "tsv_m"}},
    "realign_calm_joint": {"realign_heads": {"inner": "calm_joint"}},
}


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        suite: the suite.
        method: a name in `PIPES`.
        seed: of the method, where it draws.
        pool: the first so many inputs of every pool; 0 for all.
        order: draws CALM's order, the last two joining one by one; None leaves it to CALM.
        tasks: the first so many tasks; 0 for all.
        bad: what is wrong with the first and the fifth expert: `half` (moved half-way back to the base) or `loud`
            (its head, and so every model under it, gives logits times 4).
        longer: how many times the suite's updates.
        mix: how many times every pool's size is learned from, by mixtures; 1 is the pool, 0 leaves it to the method.
        batch: inputs of a task in each update, with updates for as many examples as the suite says; 0 for its own.
        split: `train` takes inputs without labels from what the experts were trained on, and not from the pool.
        lr: the step size; 0 leaves it to the entry and the suite.
    """

    suite: str
    method: str
    seed: int = 0
    pool: int = 0
    order: int | None = None
    tasks: int = 0
    bad: str = ""
    longer: int = 1
    mix: int = 0
    batch: int = 0
    split: str = ""
    lr: float = 0.0

    @property
    def key(self) -> str:
        """Names the trial's file."""
        told = {k: v for k, v in asdict(self).items() if v != getattr(type(self), k, "")}
        return f"trial-{hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=6).hexdigest()}"


def run(bench: Bench, trial: Trial) -> dict[str, Any]:
    """The record of a trial, from its file where it is there."""
    return bench.kept(trial.key, lambda: {"trial": asdict(trial), **_run(bench, trial)})


def _run(bench: Bench, trial: Trial) -> dict[str, Any]:
    names = list(bench.tvs.tasks[: trial.tasks or None])
    bad = names[::4] if trial.bad else []
    tvs = bench.tvs.only(names)
    tasks = Tasks(bench.tasks.model, {name: bench.tasks[name] for name in names}, autocast=bench.tasks.autocast)
    if trial.split == "train":
        tasks = tasks.with_pools(trained_on(trial.suite, names))
    if trial.pool:
        tasks = tasks.with_pools({t: first(tasks.split(t, "pool"), trial.pool) for t in names})
    if trial.bad == "half":
        tvs = weakened(tvs, bad)
    elif trial.bad == "loud":
        tasks = tasks.with_model(Loud(tasks.model, bad))
    pipe: Any = filled(PIPES[trial.method], load_suite(trial.suite).methods)
    (options,) = pipe[0].values()
    if trial.lr:
        options["lr"] = trial.lr
    if trial.longer != 1:
        options["steps"] *= trial.longer
    if trial.batch:
        options |= {"steps": options["steps"] * options["batch"] // trial.batch, "batch": trial.batch}
    if trial.mix:
        tasks = tasks.with_pools({t: Mixed(tasks.split(t, "pool"), trial.mix, trial.seed, t) for t in names})
        if trial.method == "calm_joint":
            options["fill"] = 0
    if trial.order is not None:
        drawn = [names[i] for i in permutation(len(names), trial.order, "order").tolist()]
        pipe[0]["calm"]["groups"] = [drawn[:-2], [drawn[-2]], [drawn[-1]]]
    elif trial.method == "calm" and len(names) == 2:
        pipe[0]["calm"]["groups"] = [names]
    started = time.perf_counter()
    made = merge_pipe(pipe, tasks=tasks, seed=trial.seed)(tvs)
    if not isinstance(made, Merged):
        made = materialise(made)
    seconds = time.perf_counter() - started
    if isinstance(made, Merged):
        logits = serving(made, tvs.base.only_names(tvs.specs), tasks)
        accuracy = {t: tasks.score(logits(t, "validation"), t, "validation").accuracy for t in names}
    else:
        theta = {name: tvs.base.read(name).float() + made.read(name).detach() for name in tvs}
        accuracy = {t: score.accuracy for t, score in tasks.evaluate(theta, "validation").items()}
    shares = {t: 100 * accuracy[t] / bench.experts["accuracy"][t] for t in names}
    return {
        "accuracy": accuracy,
        "normalised": fmean(shares.values()),
        "worst": min(shares.values()),
        "bad": bad,
        "sound": fmean(share for t, share in shares.items() if t not in bad),
        "seconds": seconds,
    }


def weakened(tvs: cm.TaskVectors, names: list[str]) -> cm.TaskVectors:
    """The same experts, some of them half-way back to the base."""
    experts = {
        task: {n: tvs.base.read(n).float() + (0.5 if task in names else 1.0) * w for n, w in tvs.of(task).items()}
        for task in tvs.tasks
    }
    return cm.task_vectors(StateDict({n: tvs.base.read(n) for n in tvs.specs}), experts)


def trained_on(name: str, tasks: list[str]) -> dict[str, Any]:
    """The inputs that the experts of a suite were trained on, by task."""
    suite = load_suite(name)
    changed = {task: replace(one, pool=one.train) for task, one in suite.tasks.items()}
    _, opened = cm.open_suite(replace(suite, tasks=changed), names=tasks)
    return {task: opened.split(task, "pool") for task in tasks}


def first(pool: Examples, n: int) -> Chosen:
    """The first n examples of a pool."""
    return Chosen(pool, torch.arange(min(n, len(pool))))


class Loud:
    """A model whose heads of some tasks are too sure of themselves: their logits come out times 4."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self._model, self._names = model, names

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        return self.outputs(weights, inputs, task).logits

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        logits, features = self._model.outputs(weights, inputs, task)
        return Outputs(logits * (4.0 if task in self._names else 1.0), features)


# Designs -----------------------------------------------------------------------------------------------------------

LEARNING = ("calm", "calm_joint", "distillation_tsv_m")


def orders(suite: str, *, n: int = 20) -> Iterator[Trial]:
    """E2: CALM over random orders and splits."""
    for order in range(n):
        yield Trial(suite, "calm", order=order)


def pools(suite: str) -> Iterator[Trial]:
    """E3: from 4 inputs a task to all; 64 and all with three seeds, CALM and the fewest with one."""
    for seed in range(3):
        for method in LEARNING if seed == 0 else LEARNING[1:]:
            for n in (4, 16, 64, 0) if seed == 0 and method == "calm_joint" else (64, 0):
                yield Trial(suite, method, seed, pool=n)


def splits(suite: str) -> Iterator[Trial]:
    """E3: as many inputs as the pools have, and up to 1,024, of the experts' own training data."""
    for seed in range(3 if suite == "vision" else 1):
        for n in (512, 1024):
            for method in LEARNING if seed == 0 else LEARNING[1:2]:
                yield Trial(suite, method, seed, pool=n, split="train")


def mixing(suite: str) -> Iterator[Trial]:
    """Pools eight times as large by mixtures, of 64 inputs a task and of all; distillation beside it."""
    for seed in range(3 if suite == "vision" else 1):
        for n in (64, 0):
            for mix in (1, 8):
                yield Trial(suite, "calm_joint", seed, pool=n, mix=mix)
        for mix in (0, 8):
            yield Trial(suite, "distillation_tsv_m", seed, mix=mix, batch=32 if suite == "vision" else 0)


def fills(suite: str) -> Iterator[Trial]:
    """Pools of 64 inputs a task, filled up by mixtures to 512 and to 2,048."""
    for seed in range(3):
        for mix in (8, 32):
            yield Trial(suite, "calm_joint", seed, pool=64, mix=mix)


def rounds(suite: str) -> Iterator[Trial]:
    """64 inputs a task, filled up to 2,048, and all of them, with the suite's updates and with twice as many."""
    for seed in range(3):
        for n in (64, 0):
            for longer in (2, 1):
                yield Trial(suite, "calm_joint", seed, pool=n, longer=longer, mix=32 if n else 0)


def batches(suite: str) -> Iterator[Trial]:
    """The same examples in batches of 32, 16 and 8, and so more and more updates."""
    for seed in range(3 if suite == "vision" else 1):
        for size in (32, 16, 8) if suite == "vision" else (16, 8):
            for method in LEARNING[1:]:
                mix = 1 if method == "calm_joint" else 0
                yield Trial(suite, method, seed, mix=mix, batch=size if size != 16 else 0)


def muons(suite: str) -> Iterator[Trial]:
    """`calm_joint` with orthogonal updates of matrices beside Adam's of entries, of 64 inputs a task and of all."""
    for seed in range(3):
        for n in (64, 0):
            for method in ("calm_joint", "calm_joint_muon"):
                yield Trial(suite, method, seed, pool=n)


def bad_experts(suite: str) -> Iterator[Trial]:
    """E4: two experts of eight half trained, or over-confident; beside it nothing wrong."""
    for bad in ("", "half", "loud"):
        for method in ("average", "tsv_m", *LEARNING):
            yield Trial(suite, method, bad=bad)


def heads(suite: str) -> Iterator[Trial]:
    """E5: the experts' heads as they are, and re-aligned in closed form on the pools."""
    for method in ("average", "tsv_m", "calm_joint"):
        yield Trial(suite, method)
        yield Trial(suite, f"realign_{method}")


def counts(suite: str) -> Iterator[Trial]:
    """The first 2 and 4 tasks, and all; CALM merges two by the mask between them."""
    for n in (2, 4, 0):
        for method in ("average", "task_arithmetic", "ties", "tsv_m", "iso_c", *LEARNING):
            yield Trial(suite, method, tasks=n)


def few(suite: str) -> Iterator[Trial]:
    """Two tasks with `calm_joint`'s step, whose unit grows with their number, and with twice that."""
    for seed in range(3):
        for lr in (0.0, 0.06):
            yield Trial(suite, "calm_joint", seed, tasks=2, lr=lr)


def budgets(suite: str) -> Iterator[Trial]:
    """Two and four times the suite's updates; CALM also from a spectral start."""
    for method in (*LEARNING, "calm_tsv_m"):
        for longer in (1, 2, 4):
            yield Trial(suite, method, longer=longer)


def rates(suite: str) -> Iterator[Trial]:
    """The suite's step size of distillation against 1e-3, within the league's own budget and pools."""
    for seed in range(2):
        for method in ("distillation_tsv_m", "distillation_fast"):
            yield Trial(suite, method, seed, batch=32 if suite == "vision" else 0)


def raised(suite: str) -> Iterator[Trial]:
    """Published steps, and steps raised so that updates times step size are the paper's on vision."""
    for method in ("adarank", "frank_wolfe_soft", "concrete_task_arithmetic", "concrete_adamerging"):
        yield Trial(suite, method)
        yield Trial(suite, f"{method}_raised")


def wudis(suite: str) -> Iterator[Trial]:
    """WUDI with its published step, which is absolute and made for CLIP, and with one relative to the experts."""
    for method in ("wudi", "wudi_relative"):
        yield Trial(suite, method)


DESIGNS = {
    "budgets": budgets,
    "steps": rates,
    "raised": raised,
    "wudis": wudis,
    "orders": orders,
    "pools": pools,
    "splits": splits,
    "mixing": mixing,
    "fills": fills,
    "rounds": rounds,
    "batches": batches,
    "muons": muons,
    "bad_experts": bad_experts,
    "heads": heads,
    "counts": counts,
    "few": few,
}


def main() -> None:
    bench, trials = asked(__doc__, DESIGNS)
    for trial in trials:
        found = run(bench, trial)
        told = " ".join(f"{k} {v}" for k, v in asdict(trial).items() if k not in ("suite", "method") and v)
        print(
            f"{trial.method:20} {told}: {found['normalised']:.1f} worst {found['worst']:.1f} {found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
