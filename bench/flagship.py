"""The experiments that decide the flagship: cells of a factorial design, run one by one, kept, and summed up.

    python bench/flagship.py SUITE DESIGN --out docs/experiments     # goes on where it was interrupted
    python bench/flagship_report.py docs/experiments                 # tables and effects of all finished cells

A cell is a start x an objective x a parametrisation x a schedule on one suite with one seed. Methods see the unlabelled
pools alone; every figure of a design stands on the *validation* split, so that test is left for the league. DESIGN is
one of `DESIGNS`, the functions below.
"""

import argparse
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t
from torch import Tensor

import calmerge as cm
from calmerge._task_vectors import materialise
from calmerge._weights import StateDict
from calmerge.fitting import Pool, credible, entropy, expert_kl, feature_distance, pseudo_label
from calmerge.fitting.gates import singular_gates
from calmerge.fitting.joint import Schedule, fit_jointly
from calmerge.fitting.orthogonal import orthogonal
from calmerge.fitting.parametrise import (
    Parametrisation,
    element_coefficients,
    element_masks,
    layer_coefficients,
    moved,
    reach,
    span,
)
from calmerge.fitting.targets import expert_logits
from calmerge.methods import METHODS
from calmerge.tasks.base import Outputs

Run = TypeVar("Run")

STARTS: Mapping[str, Callable[[cm.TaskVectors], cm.Weights]] = {
    "ta": partial(cm.task_arithmetic, scale=0.3),
    "average": cm.average,
    **{name: METHODS[name] for name in ("tsv_m", "iso_c", "cart", "wudi") if name in METHODS},
}
LR = {"layers": 0.1, "elements": 0.03, "masks": 0.9, "span": 0.03, "offset": 1e-3, "gates": 0.1}
"""Step sizes of Adam by parametrisation, of least held-out loss in the design `pilot` on vision; also used on text."""
DISTILLATION_LR = 3e-4
"""Of the weights themselves, from TSV-M on both suites (design `rates`)."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    suite: str
    start: str
    objective: str
    parametrisation: str
    schedule: str = "joint"
    seed: int = 0
    steps: int = 60
    batch: int = 16
    pool: int = 256
    lr: float | None = None
    balance: bool = True
    hold_out: float = 0.0
    limit: float | None = None
    bad_pool: str = ""

    @property
    def key(self) -> str:
        """Names the cell's file."""
        told = {k: v for k, v in asdict(self).items() if k not in ("limit", "bad_pool") or v}
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=6).hexdigest()


class Bench:
    """A suite opened once, with its experts' scores, and what the cells share."""

    def __init__(self, suite: str, out: Path) -> None:
        from calmerge.suites.prepare import prepare
        from calmerge.suites.suite import load_suite

        loaded = load_suite(suite)
        prepare(loaded)
        self.suite, self.version, self.out = suite, loaded.version, out
        self.tvs, self.tasks = cm.open_suite(loaded)
        self._targets: dict[tuple[str, str], Tensor] = {}
        self.experts = self.kept("experts", self._experts)
        if self.experts["version"] != self.version:
            raise SystemExit(
                f"{out} holds cells of version {self.experts['version']} of the suite '{suite}', this is version "
                f"{self.version}. Name another folder with --out."
            )

    def run(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell, from its file where it is there."""
        return self.kept(cell.key, lambda: {"cell": asdict(cell), **self._run(cell)})

    def evaluate(self, delta: cm.Weights) -> dict[str, float]:
        """Validation accuracy by task."""
        theta = {name: self.tvs.base.read(name).float() + delta.read(name).detach() for name in self.tvs}
        return {task: score.accuracy for task, score in self.tasks.evaluate(theta, "validation").items()}

    def start(self, name: str, tvs: cm.TaskVectors) -> StateDict:
        """A start merge of some tasks, kept on disk."""
        file = self.out / "starts" / f"{self.suite}-{name}-{'-'.join(tvs.tasks)}.safetensors"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({n: w.contiguous() for n, w in materialise(STARTS[name](tvs)).items()}, file)
        kept = load_file(file)
        return StateDict({n: kept[n] for n in tvs})

    def pools(self, cell: Cell, names: Sequence[str]) -> dict[str, Pool]:
        """The first `pool` examples of every pool, with the targets that the objective wants."""
        pools = {}
        for task in names:
            logits = self._target("logits", task)[: cell.pool]
            pool = Pool(torch.arange(len(logits)), logits)
            if cell.objective == "hard":
                pool = credible(logits).pool
            elif cell.objective == "features":
                features = self._target("features", task)[: cell.pool].flatten(1)
                pool = Pool(pool.indices, torch.cat([logits, features], 1))
            pools[task] = _spoiled(pool, cell.bad_pool, first=task == names[0])
        return {task: pool for task, pool in pools.items() if len(pool.indices)}

    def _run(self, cell: Cell) -> dict[str, Any]:
        started = time.perf_counter()
        run = cm.Run()
        delta = self._joint(cell, run) if cell.schedule == "joint" else self._sequential(cell, run)
        seconds = time.perf_counter() - started
        accuracy = self.evaluate(delta)
        shares = {task: 100 * accuracy[task] / self.experts["accuracy"][task] for task in accuracy}
        return {
            "accuracy": accuracy,
            "normalised": sum(shares.values()) / len(shares),
            "worst": min(shares.values()),
            "seconds": seconds,
            "loss": run.trace["fit"].loss if "fit" in run.trace else [],
            "held_out": min(run.trace["fit"].held_out, default=float("nan")) if "fit" in run.trace else float("nan"),
        }

    def _joint(self, cell: Cell, run: cm.Run) -> cm.Weights:
        return self._fit(cell, self.start(cell.start, self.tvs), self.tvs, self.tvs.tasks, cell.steps, run)

    def _sequential(self, cell: Cell, run: cm.Run) -> cm.Weights:
        """As in CALM: all but two tasks at once, then one at a time against all seen; the updates are shared out."""
        first, later = self.tvs.tasks[:-2], self.tvs.tasks[-2:]
        delta = self.start(cell.start, self.tvs.only(first))
        seen = list(first)
        for task in later:
            seen.append(task)
            delta = self._fit(cell, delta, self.tvs.only([task]), seen, cell.steps // len(later), run)
        return delta

    def _fit(
        self, cell: Cell, start: StateDict, tvs: cm.TaskVectors, seen: Sequence[str], steps: int, run: cm.Run
    ) -> StateDict:
        if steps == 0 or cell.objective == "none":
            return start
        objective = {"entropy": entropy, "hard": pseudo_label, "kl": expert_kl, "features": _kl_and_features}
        parametrisation = _parametrisation(cell, start, tvs, self.out / "triples")
        fitted = fit_jointly(
            parametrisation,
            objective[cell.objective],
            self.pools(cell, seen),
            Schedule(steps, cell.lr or LR[cell.parametrisation], cell.batch, cell.hold_out, cell.seed, cell.balance),
            tvs=self.tvs,
            tasks=self.tasks,
            features=cell.objective == "features",
            optimizer=orthogonal(parametrisation.start) if cell.parametrisation == "muon" else torch.optim.Adam,
            run=run,
            label="fit",
            key=cell.key,
        )
        return fitted

    def _target(self, kind: str, task: str) -> Tensor:
        if (kind, task) not in self._targets:
            weights = self.tvs.expert(task)
            self._targets[kind, task] = (
                expert_logits(self.tvs, self.tasks, task) if kind == "logits" else self.tasks.features(weights, task)
            )
        return self._targets[kind, task]

    def _experts(self) -> dict[str, Any]:
        logits = {t: self.tasks.logits(self.tvs.expert(t), t, "validation") for t in self.tvs.tasks}
        accuracy = {t: self.tasks.score(scores, t, "validation").accuracy for t, scores in logits.items()}
        return {"version": self.version, "accuracy": accuracy}

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A record from its file, made where it is not there."""
        file = self.out / "cells" / f"{self.suite}-{name}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".partial").write_text(json.dumps(make(), indent=1))
            file.with_suffix(".partial").rename(file)
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def _parametrisation(cell: Cell, start: StateDict, tvs: cm.TaskVectors, folder: Path) -> Parametrisation:
    if cell.parametrisation == "gates":
        folder.mkdir(exist_ok=True)
        return singular_gates(start, tvs, folder, keep=0.16, coefficient=0.0)
    if cell.parametrisation in ("span", "muon"):
        return span(start, materialise(reach(tvs)), limit=cell.limit)
    if cell.parametrisation == "offset":
        return span(start, materialise(moved(tvs)))
    shapes = {"layers": layer_coefficients, "elements": element_coefficients, "masks": element_masks}
    return shapes[cell.parametrisation](start, tvs)


def _spoiled(pool: Pool, how: str, *, first: bool) -> Pool:
    """A pool in which every other class has one in ten of its examples (`imbalance`), or nothing of one task."""
    if how == "missing" and first:
        return Pool(pool.indices[:0], pool.targets[:0])
    if how == "imbalance":
        labels = pool.targets.argmax(1)
        rare = labels % 2 == 1
        keep = ~rare | (rare.cumsum(0) % 10 == 1)
        return Pool(pool.indices[keep], pool.targets[keep])
    return pool


def _kl_and_features(outputs: Outputs, targets: Tensor) -> Tensor:
    classes = outputs.logits.shape[1]
    flat = Outputs(outputs.logits, outputs.features.flatten(1))
    return expert_kl(outputs.logits, targets[:, :classes]) + feature_distance(flat, targets[:, classes:])


# Designs -----------------------------------------------------------------------------------------------------------

FACTORS: Mapping[str, tuple[str, ...]] = {
    "start": ("ta", "average", "tsv_m", "iso_c", "cart", "wudi"),
    "objective": ("entropy", "hard", "kl", "features"),
    "parametrisation": ("layers", "masks", "elements", "span", "offset"),
    "schedule": ("sequential", "joint"),
}


def pilot(suite: str) -> Iterator[Cell]:
    """Four step sizes for every parametrisation, to be judged by the held-out loss, which needs no label."""
    for name in FACTORS["parametrisation"]:
        lr = LR[name]
        for factor in (0.1, 0.3, 1.0, 3.0):
            yield Cell(suite, "average", "kl", name, lr=round(lr * factor, 7), hold_out=0.2)


def factorial(suite: str, *, runs: int = 30, factors: Mapping[str, tuple[str, ...]] | None = None) -> list[Cell]:
    """A D-optimal fraction of the full factorial for main effects, seeds dealt out in turn.

    Levels stand equally often; coordinate exchange from a fixed random start maximises det(X'X).
    """
    factors = factors or FACTORS
    draw = torch.Generator().manual_seed(0)
    columns = {
        name: [levels[i % len(levels)] for i in torch.randperm(runs, generator=draw).tolist()]
        for name, levels in factors.items()
    }
    best = _determinant(columns, factors)
    improved = True
    while improved:
        improved = False
        for column in columns.values():
            for i, j in itertools.combinations(range(runs), 2):
                if column[i] == column[j]:
                    continue
                column[i], column[j] = column[j], column[i]
                found = _determinant(columns, factors)
                if found > best + 1e-9:
                    best, improved = found, True
                else:
                    column[i], column[j] = column[j], column[i]
    return [
        Cell(suite, *(columns[name][i] for name in ("start", "objective", "parametrisation", "schedule")), seed=i % 3)
        for i in range(runs)
    ]


CONFIRM: Mapping[str, tuple[str, ...]] = {
    "start": ("average", "tsv_m"),
    "objective": ("entropy", "hard", "kl"),
    "parametrisation": ("layers", "span", "offset"),
    "schedule": ("sequential", "joint"),
}


def confirm(suite: str) -> list[Cell]:
    """Twelve cells over the levels that mattered, for the main effects on another suite."""
    return factorial(suite, runs=12, factors=CONFIRM)


SETTLED: Mapping[str, tuple[str, ...]] = {
    "start": ("average", "tsv_m"),
    "objective": ("hard", "kl"),
    "parametrisation": ("layers", "span", "offset"),
    "schedule": ("sequential", "joint"),
}


def settled(suite: str) -> list[Cell]:
    """What `confirm` cannot tell apart next to the collapse of entropy, and of distillation at a step too large.

    Its cells without these two, and more, each the one that raises det(X'X) most; weights move freely at the step
    size that `rates` chose. Twelve were planned; twelve more were run when objective and schedule were left open.
    """
    cells = [cell for cell in confirm(suite) if cell.objective != "entropy" and cell.parametrisation != "offset"]
    while len(cells) < 24:
        seed = len(cells) % 3
        offers = [
            Cell(suite, s, o, p, d, seed, lr=DISTILLATION_LR if p == "offset" else None)
            for s, o, p, d in itertools.product(*SETTLED.values())
        ]
        fresh = [offer for offer in offers if offer not in cells]
        cells.append(max(fresh, key=lambda offer: _information([*cells, offer], SETTLED)))
    return cells


HALVED: Mapping[str, tuple[str, ...]] = {
    "start": ("ta", "average", "tsv_m", "iso_c", "cart"),
    "objective": ("hard", "kl", "features"),
    "parametrisation": ("layers", "masks", "elements", "span", "offset"),
    "schedule": ("sequential", "joint"),
}


def halved(suite: str) -> list[Cell]:
    """A second fraction, without the levels that the first one showed to collapse (entropy, WUDI's start)."""
    return factorial(suite, runs=20, factors=HALVED)


def references(suite: str) -> Iterator[Cell]:
    """The starts alone."""
    for start in FACTORS["start"]:
        yield Cell(suite, start, "none", "offset", steps=0)


def _information(cells: Sequence[Cell], factors: Mapping[str, tuple[str, ...]]) -> float:
    """log det(X'X + I / 1000): the ridge lets designs too small to be solved be compared as well."""
    x = _matrix({name: [getattr(cell, name) for cell in cells] for name in factors}, factors)
    return float(torch.linalg.slogdet(x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype)).logabsdet)


def _determinant(columns: Mapping[str, Sequence[str]], factors: Mapping[str, tuple[str, ...]]) -> float:
    x = _matrix(columns, factors)
    return float(torch.linalg.slogdet(x.T @ x).logabsdet)


def _matrix(columns: Mapping[str, Sequence[str]], factors: Mapping[str, tuple[str, ...]]) -> Tensor:
    """Columns for the mean and, coded to sum to zero, all levels but the last of every factor: [runs, parameters]."""
    runs = len(next(iter(columns.values())))
    x = [torch.ones(runs, dtype=torch.float64)]
    for name, levels in factors.items():
        for level in levels[:-1]:
            x.append(
                torch.tensor([float(v == level) - float(v == levels[-1]) for v in columns[name]], dtype=torch.float64)
            )
    return torch.stack(x, 1)


def effects(
    cells: Sequence[Mapping[str, Any]], measure: str, factors: Mapping[str, tuple[Any, ...]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """By factor and level, the main effect (difference from the mean of all) and half its 95 % interval."""
    columns = {name: [cell["cell"][name] for cell in cells] for name in factors}
    x = _matrix(columns, factors)
    y = torch.tensor([cell[measure] for cell in cells], dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x)
    beta = inverse @ x.T @ y
    degrees = len(cells) - x.shape[1]
    variance = (y - x @ beta).square().sum() / degrees
    found: dict[str, dict[str, tuple[float, float]]] = {}
    at = 1
    for name, levels in factors.items():
        found[name] = {}
        for i, level in enumerate(levels):
            c = torch.zeros(x.shape[1], dtype=torch.float64)
            c[at : at + len(levels) - 1] = -1.0 if i == len(levels) - 1 else 0.0
            if i < len(levels) - 1:
                c[at + i] = 1.0
            half = float(student_t.ppf(0.975, degrees)) * float((variance * (c @ inverse @ c)).sqrt())
            found[name][level] = (float(c @ beta), half)
        at += len(levels) - 1
    return found


FLAGSHIP = {"objective": "kl", "parametrisation": "span", "limit": 1.0, "hold_out": 0.2, "steps": 120}
DISTILLATION = {**FLAGSHIP, "parametrisation": "offset", "limit": None}


def levers(suite: str) -> Iterator[Cell]:
    """What is left to choose once start, objective and schedule are: bounds, balance, and which weights move."""
    for seed, balance in itertools.product(range(3), (True, False)):
        for options in (FLAGSHIP, {**FLAGSHIP, "limit": None}, DISTILLATION):
            yield Cell(suite, "tsv_m", seed=seed, balance=balance, **options)


def pool(suite: str) -> Iterator[Cell]:
    """Pools of 4 to 512 inputs a task, without one task's pool, and with classes 10 : 1."""
    for options in (FLAGSHIP, DISTILLATION):
        for n in (4, 16, 64, 256, 512):
            yield Cell(suite, "tsv_m", pool=n, **options)
        for bad in ("missing", "imbalance"):
            yield Cell(suite, "tsv_m", bad_pool=bad, **options)


def whole(suite: str) -> Cell:
    """`calm_joint` with all inputs, which are too many for mixtures, and the suite's updates."""
    return Cell(suite, "tsv_m", "kl", "span", steps=240 if suite == "vision" else 160, pool=1024)


def spoiled(suite: str) -> Iterator[Cell]:
    """Without one task's pool, and with classes 10 : 1, all else of the pools there and `calm_joint`'s updates."""
    for bad in ("missing", "imbalance"):
        yield replace(whole(suite), bad_pool=bad)
        yield replace(whole(suite), bad_pool=bad, parametrisation="offset", lr=DISTILLATION_LR)


def rates(suite: str) -> Iterator[Cell]:
    """Step sizes of plain distillation from TSV-M on both suites, as `pilot` chose those of all else on vision.

    The rule stated before was the held-out loss, as a share of the least on its suite, least where that is greater:
    1e-4. Validation accuracy is better at 3e-4 on both suites, and the suites take that, so that the baseline is no
    weaker than it need be.
    """
    for lr in (1e-4, 3e-4, 1e-3):
        yield Cell(suite, "tsv_m", "kl", "offset", lr=lr, hold_out=0.2)
    yield Cell(suite, "tsv_m", "kl", "span", hold_out=0.2)


HELD: Mapping[str, tuple[Any, ...]] = {
    "parametrisation": ("span", "offset"),
    "hold_out": (0.0, 0.2),
    "balance": (True, False),
}


def held(suite: str) -> Iterator[Cell]:
    """All combinations of what tells `calm_joint` from distillation, at a fair step; vision with two seeds."""
    for seed in range(2 if suite == "vision" else 1):
        for moves, share, balance in itertools.product(*HELD.values()):
            lr = DISTILLATION_LR if moves == "offset" else None
            yield Cell(suite, "tsv_m", "kl", moves, seed=seed, lr=lr, hold_out=share, balance=balance)


def gates(suite: str) -> Iterator[Cell]:
    """Singular gates with coefficients on top of TSV-M beside other parametrisations, steps as in `pilot`.

    With a held-out share and few updates as the other cells, then with 512 inputs a task and `calm_joint`'s updates.
    """
    for budget in (
        Cell(suite, "tsv_m", "kl", "gates", hold_out=0.2),
        Cell(suite, "tsv_m", "kl", "gates", steps=240, pool=512),
    ):
        for lr in (0.01, 0.03, 0.1):
            yield replace(budget, lr=lr)
        for parametrisation in ("layers", "elements", "span"):
            yield replace(budget, parametrisation=parametrisation)


def optimizers(suite: str) -> Iterator[Cell]:
    """Orthogonal updates of matrices beside Adam's of entries, with 512 inputs a task and `calm_joint`'s updates."""
    adam = replace(whole(suite), pool=512)
    for seed in range(3):
        yield replace(adam, parametrisation="muon", lr=0.05, seed=seed)
        yield replace(adam, seed=seed)


def features(suite: str) -> Iterator[Cell]:
    """The distance of features beside KL, and KL alone, with all inputs and `calm_joint`'s updates."""
    for seed in range(3):
        for objective in ("features", "kl"):
            yield replace(whole(suite), objective=objective, seed=seed)


DESIGNS = {
    "pilot": pilot,
    "factorial": factorial,
    "halved": halved,
    "confirm": confirm,
    "references": references,
    "levers": levers,
    "pool": pool,
    "spoiled": spoiled,
    "rates": rates,
    "held": held,
    "gates": gates,
    "features": features,
    "optimizers": optimizers,
    "settled": settled,
}


def asked(doc: str | None, designs: Mapping[str, Callable[[str], Iterable[Run]]]) -> tuple[Bench, Iterable[Run]]:
    """The suite that the command line names, opened, and the runs of the design that it names."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("design", choices=designs)
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"))
    args = parser.parse_args()
    return Bench(args.suite, args.out), designs[args.design](args.suite)


def main() -> None:
    bench, cells = asked(__doc__, DESIGNS)
    for cell in cells:
        found = bench.run(cell)
        print(
            f"{cell.start:8} {cell.objective:9} {cell.parametrisation:9} {cell.schedule:10} seed {cell.seed} "
            f"lr {cell.lr or LR[cell.parametrisation]:g}: {found['normalised']:.1f} worst {found['worst']:.1f} "
            f"held out {found['held_out']:.4f} {found['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
