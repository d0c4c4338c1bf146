"""The README.md of a merged folder: front matter for the hub, results, how to load each task, recipe, licence."""

import re

import yaml

from calmerge.report.league import split_stamp, standings
from calmerge.report.results import Report
from calmerge.report.tables import percent

AUTO_CLASSES = {
    "sequence-classifier": ("AutoModelForSequenceClassification", "text-classification"),
    "image-classifier": ("AutoModelForImageClassification", "image-classification"),
}


def model_card(
    report: Report,
    *,
    label: str | None = None,
    folder: str = "merged",
    whole: str | None = None,
    licence: str | None = None,
) -> str:
    """The model card of one merged model, as Markdown.

    Args:
        report: where the model comes from; test scores are printed if its rows have any.
        label: which row's model it is; the first method of the report if None.
        folder: how the text calls the merged folder.
        whole: the class of transformers that loads the folder, where no task has a head of its own.
        licence: licence identifier of the result; without one the card says what to check.

    >>> report = Report(title="Two tasks", created="2026-01-31", tasks=[{"name": "cars"}, {"name": "dtd"}],
    ...                 inputs={"base": {"label": "google/vit-base"}, "cars": {"label": "./cars"}},
    ...                 rows=[{"method": "ties", "label": "TIES", "options": {"keep": 0.2}}],
    ...                 versions={"calmerge": "0.1.0", "torch": "2.9", "python": "3.11", "platform": "Linux"})
    >>> print(model_card(report))
    ---
    library_name: transformers
    tags:
    - model-merging
    - calmerge
    base_model: google/vit-base
    base_model_relation: merge
    ---
    <BLANKLINE>
    # cars, dtd: merged with TIES
    ...
    """
    row = next((row for row in report.methods() if label in (None, row.label)), None)
    tasks = [task.name for task in report.tasks]
    method = row.label if row else (label or "calmerge")
    options = "".join(f", `{name}: {value}`" for name, value in row.options.items()) if row else ""
    seed = f", seed {row.seed}" if row and row.seed is not None else ""
    experts = ", ".join(f"`{found.label}`" for name, found in report.inputs.items() if name != "base")
    made = f"fine-tuned experts of `{report.inputs['base'].label}`" if "base" in report.inputs else "several models"
    parts = [
        _front_matter(report, licence),
        f"# {', '.join(tasks)}: merged with {method}" if tasks else f"# {report.title}",
        f"One model made from {made} by calmerge {report.versions.calmerge}: {method}{options}"
        f"{seed}. Data seen besides the weights: {row.data if row else 'none'}."
        + (f" {'Experts' if 'base' in report.inputs else 'Models'}: {experts}." if experts else ""),
        _results(report, method),
        _loading_whole(whole, folder) if whole else _loading(report, tasks, folder),
        _recipe(report),
        _licence(report, licence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(report: Report, licence: str | None) -> str:
    model = report.suite.model if report.suite else None
    fields: dict[str, object] = {"library_name": "transformers", "tags": ["model-merging", "calmerge"]}
    if model in AUTO_CLASSES:
        fields["pipeline_tag"] = AUTO_CLASSES[model][1]
    hub = {name: i.label for name, i in report.inputs.items() if re.fullmatch(r"[\w.-]+/[\w.-]+", i.label)}
    if "base" in hub:
        fields |= {"base_model": hub["base"], "base_model_relation": "merge"}
    if licence:
        fields["license"] = licence
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _results(report: Report, label: str) -> str:
    lines = standings(report)
    found = next((line for line in lines if line.label == label and line.tasks), None)
    if found is None or not found.tasks or not found.mean:
        return ""
    others = {line.method: line.tasks for line in lines if line.is_reference and line.tasks}
    shown = [found.tasks, *others.values()]
    rows = [["task", label, *others], [":--"] + ["--:"] * len(shown)]
    rows += [[task.name, *(str(column[task.name]) for column in shown)] for task in report.tasks]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    relative = f", {percent(found.normalised_mean.mean)} % of the experts'" if found.normalised_mean else ""
    runs = f"; {found.mean.n} seeds, ± their standard deviation" if found.mean.n > 1 else ""
    stamp = f"split: {split_stamp(report)}{runs}"
    return f"## Results\n\nMean accuracy {found.mean} %{relative} ({stamp}). Accuracy on test data, %:\n\n{table}"


def _loading_whole(name: str, folder: str) -> str:
    return f'## Use\n\n```python\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained("{folder}")\n```'


def _loading(report: Report, tasks: list[str], folder: str) -> str:
    if not tasks:
        return ""
    words = (
        "The backbone is shared; every task keeps its own head. Write the full model of a task to a folder of its own:"
    )
    commands = "\n".join(f"calmerge export {folder} --task {task} --out {task}" for task in tasks)
    text = f"## Use\n\n{words}\n\n```bash\n{commands}\n```"
    model = report.suite.model if report.suite else None
    if model in AUTO_CLASSES:
        name = AUTO_CLASSES[model][0]
        text += f'\n\n```python\nfrom transformers import {name}\n\nmodel = {name}.from_pretrained("{tasks[0]}")\n```'
    return text


def _recipe(report: Report) -> str:
    text = "## How it was made"
    if report.command:
        text += f"\n\n```bash\n{report.command}\n```"
    if report.recipe:
        recipe = report.model_dump(mode="json")["recipe"]
        text += f"\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"
    versions = ", ".join(f"{name} {value}" for name, value in report.versions.model_dump(exclude_none=True).items())
    text += f"\n\nVersions: {versions}."
    hashes = [
        f"- {name}: `{found.label}`, blake3 `{found.blake3}`" for name, found in report.inputs.items() if found.blake3
    ]
    return text + ("\n\nInputs:\n\n" + "\n".join(hashes) if hashes else "")


def _licence(report: Report, licence: str | None) -> str:
    known = [f"- {name}: {found.licence}" for name, found in report.inputs.items() if found.licence]
    text = "## Licence\n\n"
    text += f"{licence}. " if licence else ""
    text += "A merged model is derived from its base and from every expert; the licences of all of them apply together."
    return text + ("\n\n" + "\n".join(known) if known else "")
