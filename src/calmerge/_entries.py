"""What the league compares: published methods that merge full classifiers, each a merge as a recipe writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from calmerge._errors import UsageError, did_you_mean
from calmerge._pipe import WHERE, Step, gives_patches, needs_tasks, read_pipe, walk
from calmerge._signature import options_of
from calmerge._yaml import Data, from_data
from calmerge.methods import METHODS

GRID = tuple(round(0.05 * i, 2) for i in range(1, 21))
SPACE: Data = {"ties.keep": [0.05, 1.0], "ties.scale": [0.2, 2.0]}
"""What is searched without labels, as an instance of what needs a score only."""
UNLABELLED: dict[str, Data] = {"score": "expert_kl", "examples": 64}
"""How methods that need a score only have one without labels."""
QUICK = 4
"""By what the updates of learning methods are divided in a quick look."""


@dataclass(frozen=True)
class Entry:
    """One line of the league.

    Args:
        label: what tables call it.
        merge: as in a recipe: a method, a method with options, or a pipe of them.
        tune: an option of the first step, and the values to choose from by mean normalised accuracy on the validation
            splits.
        on_test: let it learn from the test inputs.

    >>> Entry("LiNeS", ["task_arithmetic", {"lines": {"beta": 0.5}}]).name
    'task_arithmetic + lines'
    >>> Entry("EMR", "emr").per_task, Entry("CALM", "calm").learns, Entry("CALM", "calm").draws
    (True, True, True)
    """

    label: str
    merge: Data
    tune: tuple[str, Sequence[float]] | None = None
    on_test: bool = False

    @property
    def steps(self) -> tuple[Step, ...]:
        """The calls of the pipe."""
        return read_pipe(from_data(self.merge, self.label), [])

    @property
    def name(self) -> str:
        """The methods of the pipe, joined by "+"."""
        return " + ".join(step.name for step in self.steps)

    @property
    def learns(self) -> bool:
        """Whether any of its methods needs unlabelled data."""
        return any(needs_tasks(METHODS[step.name]) for step in walk(self.steps, METHODS))

    @property
    def draws(self) -> bool:
        """Whether any of its methods has a seed."""
        return any("seed" in options_of(METHODS[step.name]) for step in walk(self.steps, METHODS))

    @property
    def per_task(self) -> bool:
        """Whether a model for each task comes out."""
        return any(gives_patches(METHODS[step.name]) for step in self.steps)


ENTRIES: Mapping[str, Entry] = {
    "average": Entry("Averaging", "average"),
    "task_arithmetic": Entry("Task Arithmetic 0.3", {"task_arithmetic": {"scale": 0.3}}),
    "task_arithmetic_tuned": Entry("Task Arithmetic, tuned", "task_arithmetic", tune=("scale", GRID)),
    "ties": Entry("TIES", "ties"),
    "dare": Entry("DARE", "dare"),
    "dare_ties": Entry("DARE-TIES", "dare_ties"),
    "della": Entry("DELLA", "della"),
    "breadcrumbs": Entry("Breadcrumbs", "breadcrumbs"),
    "lines": Entry("LiNeS", ["task_arithmetic", "lines"]),
    "consensus": Entry("Consensus TA", [{"task_arithmetic": {"scale": 0.3}}, "consensus"]),
    "pcb": Entry("PCB-Merging", "pcb"),
    "magmax": Entry("MagMax", "magmax"),
    "sce": Entry("SCE", "sce"),
    "ram": Entry("RAM", "ram"),
    "model_stock": Entry("Model Stock", "model_stock"),
    "karcher": Entry("Karcher mean", "karcher"),
    "localize_and_stitch_dataless": Entry("L&S, dataless", "localize_and_stitch_dataless"),
    "doge": Entry("DOGE TA", "doge"),
    "tsv_m": Entry("TSV-M", "tsv_m"),
    "iso_c": Entry("Iso-C", "iso_c"),
    "iso_cts": Entry("Iso-CTS", "iso_cts"),
    "cart": Entry("CART", "cart"),
    "wudi": Entry("WUDI", "wudi"),
    "svc": Entry("SVC on TA", ["task_arithmetic", "svc"]),
    "knots": Entry("KnOTS-TIES", "knots"),
    "dc_merge": Entry("DC-Merge", "dc_merge"),
    "fisher": Entry("Fisher", "fisher"),
    "regmean": Entry("RegMean", "regmean"),
    "regmean_pp": Entry("RegMean++", "regmean_pp"),
    "adamerging": Entry("AdaMerging", "adamerging"),
    "adamerging_pp": Entry("AdaMerging++", "adamerging_pp"),
    "concrete_task_arithmetic": Entry("Concrete TA", "concrete_task_arithmetic"),
    "concrete_adamerging": Entry("Concrete AdaMerging", "concrete_adamerging"),
    "adarank": Entry("AdaRank", "adarank"),
    "frank_wolfe": Entry("FW-Merging", "frank_wolfe"),
    "frank_wolfe_soft": Entry("FW-Merging, soft", "frank_wolfe_soft"),
    "localize_and_stitch": Entry("Localize-and-Stitch", "localize_and_stitch"),
    "prodistill": Entry("ProDistill", "prodistill"),
    "searched": Entry("TIES, searched", {"searched": {"inner": "ties", "space": SPACE, **UNLABELLED}}),
    "map_front": Entry("MAP", {"map_front": UNLABELLED}),
    "map_nested": Entry("MAP, nested", {"map_nested": UNLABELLED}),
    "medsamix": Entry("MedSAMix", {"medsamix": UNLABELLED}),
    "calm": Entry("CALM", "calm"),
    "calm_joint": Entry("CALM, joint", "calm_joint"),
    "calm_joint_muon": Entry("CALM, joint, Muon", {"calm_joint": {"optimizer": "muon", "lr": 0.05}}),
    "distillation": Entry("Distillation", "distillation"),
    "distillation_tsv_m": Entry("Distillation, TSV-M", {"distillation": {"inner": "tsv_m"}}),
    "distillation_iso_c": Entry("Distillation, Iso-C", {"distillation": {"inner": "iso_c"}}),
    "tall_masks": Entry("TALL-masks", "tall_masks"),
    "emr": Entry("EMR-Merging", "emr"),
    "tsv_c": Entry("TSV-C", "tsv_c"),
    "surgery": Entry("TA + Surgery", "surgery"),
    "realign_heads": Entry("TA + heads re-aligned", "realign_heads"),
    "smile": Entry("SMILE", {"smile": {"directions": 16}}),
    "twin_merging": Entry("Twin-Merging", "twin_merging"),
    "twin_merging_routed": Entry("Twin-Merging, routed", "twin_merging_routed"),
}
"""What `run_bench` compares when nothing is named, in the order of work: cheap ones first, then those that learn."""


def entries_of(names: Sequence[str] | None) -> list[Entry]:
    """The entries of these names; a method that is no entry makes one with its defaults.

    Raises:
        UsageError: no entry or method has that name.

    >>> [entry.label for entry in entries_of(["ties", "slerp"])]
    ['TIES', 'slerp']
    """
    found = []
    for name in dict.fromkeys(names or ENTRIES):
        if name not in ENTRIES and name not in METHODS:
            raise UsageError(f"no method is called '{name}'. {did_you_mean(name, [*ENTRIES, *METHODS])}")
        found.append(ENTRIES.get(name, Entry(name, name)))
    return found


def filled(merge: Data, options: Mapping[str, Mapping[str, Data]], *, quick: bool = False) -> list[Data]:
    """The pipe `merge` with a suite's `options` for every step that does not state its own, inner ones as well.

    >>> filled(["task_arithmetic", {"lines": {"beta": 0.2}}], {"task_arithmetic": {"scale": 0.4}, "lines": {"beta": 1}})
    [{'task_arithmetic': {'scale': 0.4}}, {'lines': {'beta': 0.2}}]
    >>> filled({"distillation": {"inner": "ties"}}, {"ties": {"keep": 0.1}, "distillation": {"steps": 8}}, quick=True)
    [{'distillation': {'steps': 2, 'inner': [{'ties': {'keep': 0.1}}]}}]
    """
    return [_step(step, options, quick) for step in read_pipe(from_data(merge, "merge"), [])]


def _step(step: Step, options: Mapping[str, Mapping[str, Data]], quick: bool) -> Data:
    if step.name == WHERE:
        return step.to_data()
    known = options_of(METHODS[step.name])
    found = {**options.get(step.name, {}), **{key: node.plain() for key, node in step.options.items()}}
    for key, value in found.items():
        if known[key].takes_merge and value is not None:
            found[key] = filled(value, options, quick=quick)
    if quick and needs_tasks(METHODS[step.name]):
        counts = (key for key in ("steps", "mask_steps", "updates", "epochs") if key in known)
        found |= {key: max(1, _number(found.get(key, known[key].default)) // QUICK) for key in counts}
    return {step.name: found}


def _number(value: Any) -> int:
    return int(value)
