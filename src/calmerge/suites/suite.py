"""A suite: a model, its tasks with their experts and data, and how they are compared. One YAML file, described in
docs/suites.md; the embedded ones are such files too.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calmerge._errors import UsageError, did_you_mean
from calmerge._pipe import Methods, Step, check_pipe
from calmerge._signature import Count, check, raise_together
from calmerge._yaml import Data, Node, load

if TYPE_CHECKING:
    from calmerge.suites.finetune import Finetune

Kind = Literal["sequence-classifier", "image-classifier", "sentence-encoder"]
SPLITS = ("train", "pool", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The kind of model that a suite is about.

    Args:
        kind: what the checkpoints are. `sentence-encoder` is an encoder with mean pooling, L2 norm and a linear head.
        max_tokens: longer texts are cut here; 128 if not given. Texts only.
        autocast: `bfloat16` computes the model's matrix products in bfloat16; weights and gradients stay float32.
    """

    kind: Kind
    max_tokens: Count | None = None
    autocast: Literal["none", "bfloat16"] = "none"


@dataclass(frozen=True, kw_only=True)
class SuiteTask:
    """One task of a suite. Paths are absolute; text stands for an id on a hub.

    Args:
        name: the key of the task in the file.
        expert: folder (or hub id) of the fine-tuned model, with its head.
        classes: names in the order of the head's outputs.
        pool: unlabelled examples, what methods may learn from; a label column is never read.
        test: labelled, for the scores. None only in recipes.
        validation: labelled, for choosing numbers.
        train: labelled, for making the expert.
        input: column of the input; "text" or "image" if not given.
        label: column of the labels, ids or class names; "label" if not given.
        finetune: settings that differ from the suite's.
    """

    name: str
    expert: Path | str
    classes: Sequence[str]
    pool: Path | str
    test: Path | str | None = None
    validation: Path | str | None = None
    train: Path | str | None = None
    input: str | None = None
    label: str = "label"
    title: str | None = None
    licence: str | None = None
    source: str | None = None
    finetune: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A checked suite.

    Args:
        name: the key `suite` of the file.
        version: raised when numbers cease to be comparable.
        base: folder or hub id of what the experts were fine-tuned from.
        exclude: shell patterns of tensors that are not merged.
        heads: shell patterns of tensors that are kept per task although all have them in one shape.
        finetune: how experts are made; None if the file does not say.
        methods: options by method for the bench, where they are not the functions' defaults.
        notes: sentences that every report prints.
        make: module whose `make(folder, run)` brings base and data; embedded suites only.
        transductive: the pools are made of the test inputs, which the suite states; stamped on every number.
        file: the YAML file.
        folder: where its relative paths start.
        data: the file's content, plain, with each task's `label` and `classes` filled in.
        lines: "file:line" by dotted path, for messages.
    """

    name: str
    version: int
    title: str
    model: Model
    base: Path | str
    tasks: Mapping[str, SuiteTask]
    exclude: Sequence[str] = ()
    heads: Sequence[str] = ()
    finetune: "Finetune | None" = None
    methods: Mapping[str, Mapping[str, Data]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    make: str | None = None
    transductive: bool = False
    file: Path
    folder: Path
    data: Mapping[str, Any] = field(repr=False)
    lines: Mapping[str, str] = field(repr=False, compare=False)

    @property
    def experts(self) -> dict[str, Path | str]:
        """The experts by task, as `task_vectors` takes them."""
        return {name: task.expert for name, task in self.tasks.items()}

    @property
    def embedded(self) -> bool:
        """Whether the suite came with the package."""
        return self.make is not None


def load_suite(name_or_path: str | Path, *, methods: Methods | None = None) -> Suite:
    """The suite of a file, or the embedded one of a name.

    Relative paths in a file start at its folder; those of an embedded suite at its folder in the cache. Whether the
    files exist is a separate question: `missing_files`.

    Args:
        name_or_path: a path to a YAML file, or one of `embedded_suites()`.
        methods: the table that `methods:` is checked against; `calmerge.methods.METHODS` if not given.

    Raises:
        UsageError: no such suite, or mistakes in it; all of them together, with their lines.
    """
    file = _find(name_or_path)
    embedded = file in embedded_suites().values()
    node = load(file)
    name = node.get("suite")
    version = node.get("version")
    if embedded and name and version:
        from calmerge.suites._fetch import cache_folder

        folder = cache_folder() / "suites" / f"{name.value}-v{version.value}"
    else:
        folder = file.resolve().parent
    problems: list[str] = []
    suite = read_suite(node, file, folder, problems, embedded=embedded, methods=methods)
    raise_together(problems)
    assert suite is not None  # nothing is missing where nothing is wrong
    return suite


def embedded_suites() -> dict[str, Path]:
    """The suites that come with calmerge: file by name.

    >>> sorted(embedded_suites()) == [f.stem for f in sorted(embedded_suites().values())]
    True
    """
    folder = Path(str(resources.files("calmerge.suites")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def missing_files(suite: Suite) -> list[str]:
    """One sentence, with its line, for every local file of the suite that is not there.

    An expert may be missing where the suite can make it (`finetune` and a `train` split).
    """
    problems = []

    def look(path: Path | str | None, key: str, what: str) -> None:
        if isinstance(path, Path) and not path.exists():
            problems.append(f"{suite.lines.get(key, suite.file.name)}: {what} is missing: {path}.")

    look(suite.base, "base", "the base")
    for task in suite.tasks.values():
        if not (suite.finetune and task.train):
            look(task.expert, f"tasks.{task.name}.expert", f"the expert of task '{task.name}'")
        for split in SPLITS:
            look(getattr(task, split), f"tasks.{task.name}.{split}", f"the {split} split of task '{task.name}'")
    return problems


def read_suite(
    node: Node,
    file: Path,
    folder: Path,
    problems: list[str],
    *,
    embedded: bool = False,
    methods: Methods | None = None,
) -> Suite | None:
    """The suite that `node` describes; its mistakes go to `problems`, and None comes back if there are any."""
    before = len(problems)
    if not node.is_mapping():
        problems.append(f"{node.where}: a suite is a mapping with the keys suite, version, model, base, tasks.")
        return None
    lines = dict(lines_of(node, ""))
    parts: dict[str, Any] = {key: part.plain() for key, part in node.items()}
    if isinstance(parts.get("base"), str):
        parts["base"] = located(parts["base"], folder, never_hub=embedded)
    for key, reader in {"model": read_model, "finetune": _read_finetune}.items():
        if key in parts:
            parts[key] = reader(node.value[key], problems)
    if "tasks" in parts:
        parts["tasks"] = read_tasks(node.value["tasks"], folder, problems, never_hub=embedded)
    problems += check(_keys_of_a_suite, parts, node.lines(), name="suite", noun="key")
    if isinstance(parts.get("suite"), str) and not _NAME.fullmatch(parts["suite"]):
        problems.append(f"{lines['suite']}: a suite called '{parts['suite']}': {_NAME_RULE}")
    if "methods" in parts:
        _check_methods(node.value["methods"], methods, problems)
    if "make" in parts and not embedded:
        problems.append(f"{lines['make']}: only the suites that come with calmerge can name code to run.")
    tasks = parts.get("tasks") or {}
    for task in tasks.values():
        if task.test is None:
            problems.append(f"{lines['tasks.' + task.name]}: task '{task.name}' needs a test split for its score.")
        check_splits(task, lines, parts.get("transductive") is True, problems)
    if len(problems) > before:
        return None
    parts["name"] = parts.pop("suite")
    parts["title"] = parts.get("title") or parts["name"]
    parts["methods"] = {name: options or {} for name, options in (parts.get("methods") or {}).items()}
    data: dict[str, Any] = node.plain()  # type: ignore[assignment]
    for task in tasks.values():
        data["tasks"][task.name] |= {"label": task.label, "classes": list(task.classes)}
    return Suite(**parts, file=file, folder=folder, data=data, lines=lines)


def read_tasks(
    node: Node,
    folder: Path,
    problems: list[str],
    *,
    experts: Mapping[str, Path | str] | None = None,
    never_hub: bool = False,
) -> dict[str, SuiteTask]:
    """The tasks that `node` describes. A recipe hands in its `experts`, so that its tasks name none."""
    if not node.is_mapping() or not node.value:
        problems.append(f"{node.where}: 'tasks' must be a mapping from each task's name to its data.")
        return {}
    tasks = {}
    for name, entry in node.items():
        found = len(problems)
        label = f"task '{name}'"
        if not _NAME.fullmatch(name):
            problems.append(f"{entry.where}: {label}: {_NAME_RULE}")
        if not entry.is_mapping():
            problems.append(f"{entry.where}: {label} must be a mapping with the keys expert, classes, pool and test.")
            continue
        parts: dict[str, Any] = {key: part.plain() for key, part in entry.items()}
        if isinstance(parts.get("classes"), list):
            parts["classes"] = tuple(str(c) if type(c) is int else c for c in parts["classes"])
        for key in SPLITS:
            if isinstance(parts.get(key), str):
                parts[key] = located_data(parts[key], folder)
        if isinstance(parts.get("expert"), str):
            parts["expert"] = located(parts["expert"], folder, never_hub=never_hub or "train" in parts)
        provided = ["name"] if experts is None else ["name", "expert"]
        problems += check(SuiteTask, parts, entry.lines(), name=label, provided=provided, noun="key")
        _check_classes(parts.get("classes"), entry, label, problems)
        if "finetune" in parts:
            _read_finetune(entry.value["finetune"], problems)
        if experts is not None:
            parts["expert"] = experts.get(name, "")
        if len(problems) == found:
            tasks[name] = SuiteTask(name=name, **parts)
    return tasks


def read_model(node: Node, problems: list[str]) -> Model | None:
    """The kind of model that `node` describes."""
    if not node.is_mapping():
        problems.append(f"{node.where}: 'model' must be a mapping, as in {{kind: sequence-classifier}}.")
        return None
    faults = check(Model, node.plain(), node.lines(), name="model", noun="key")  # type: ignore[arg-type]
    problems += faults
    return None if faults else Model(**node.plain())  # type: ignore[arg-type]


def check_splits(task: SuiteTask, lines: Mapping[str, str], transductive: bool, problems: list[str]) -> None:
    """Sentences on splits that must differ and do not."""
    if task.test is None:
        return
    at = f"tasks.{task.name}."
    if task.pool == task.test and not transductive:
        problems.append(
            f"{lines[at + 'pool']}: task '{task.name}' has its test split as pool, so methods would learn from the "
            "inputs they are tested on. Name another pool, or state 'transductive: true' at the top of the file."
        )
    for split in ("train", "validation"):
        if getattr(task, split) == task.test:
            problems.append(
                f"{lines[at + split]}: task '{task.name}' has its test split as {split} too; scores would mean "
                "nothing. Name another."
            )


def lines_of(node: Node, path: str) -> Iterator[tuple[str, str]]:
    """Place by dotted path, of everything below a node."""
    for key, part in node.items():
        yield path + key, part.where
        yield from lines_of(part, f"{path}{key}.")


def located(text: str, folder: Path, *, never_hub: bool = False) -> Path | str:
    """Where a checkpoint is: a path made absolute, or the text itself if it is a hub id.

    Text of the form of a hub id is one, unless a folder of its first part is there, or `never_hub` rules it out.

    >>> located("~/none", Path("/data")) == Path.home() / "none", located("google/vit-base", Path("/data"))
    (True, 'google/vit-base')
    >>> print(located("./vit", Path("/data")), located("vit", Path("/data")))
    /data/vit /data/vit
    """
    path = folder / Path(text).expanduser()
    begun = folder / Path(text).parts[0] if text else folder
    if never_hub or begun.exists() or not _HUB_ID.fullmatch(text):
        return path
    return text


def located_data(text: str, folder: Path) -> Path | str:
    """Where data are: a path made absolute, or the text itself if it is a `datasets` id with a split.

    >>> located_data("ag_news:train[:500]", Path("/data")), str(located_data("movies.csv", Path("/data")))
    ('ag_news:train[:500]', '/data/movies.csv')
    """
    return text if _DATASET.fullmatch(text) else folder / Path(text).expanduser()


# The parts -----------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NAME_RULE = "its name becomes a folder's; use letters, digits, '-', '_' and '.', and begin with a letter or digit."
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(#[\w.-]+)?:[\w]+(\[[^\]]*\])?")


def _keys_of_a_suite(
    *,
    suite: str,
    version: Count,
    model: Any,
    base: Path | str,
    tasks: Any,
    title: str | None = None,
    exclude: Sequence[str] = (),
    heads: Sequence[str] = (),
    finetune: Any = None,
    methods: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    make: str | None = None,
    transductive: bool = False,
) -> None:
    """The top level of the file, in a form that `check` can read."""


def _check_classes(classes: Any, entry: Node, label: str, problems: list[str]) -> None:
    if not isinstance(classes, tuple):
        return
    where = entry.value["classes"].where
    if len(classes) < 2:
        problems.append(f"{where}: {label} needs at least two classes, got {len(classes)}.")
    twice = next((c for i, c in enumerate(classes) if c in classes[:i]), None)
    if twice is not None:
        problems.append(f"{where}: {label} names the class '{twice}' twice.")


def _read_finetune(node: Node, problems: list[str]) -> "Finetune | None":
    from calmerge.suites.finetune import Finetune

    if not node.is_mapping():
        problems.append(f"{node.where}: 'finetune' must be a mapping of settings, such as {{epochs: 3}}.")
        return None
    faults = check(Finetune, node.plain(), node.lines(), name="finetune", noun="key")  # type: ignore[arg-type]
    problems += faults
    return None if faults else Finetune.parse(node.plain())  # type: ignore[arg-type]


def _check_methods(node: Node, methods: Methods | None, problems: list[str]) -> None:
    if methods is None:
        from calmerge.methods import METHODS

        methods = METHODS
    for name, options in node.items():
        if options.value is not None and not options.is_mapping():
            problems.append(f"{options.where}: the options of {name} must be a mapping.")
            continue
        problems += check_pipe([Step(name, dict(options.items()), options.where)], methods)


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    known = embedded_suites()
    if text in known:
        return known[text]
    path = Path(text).expanduser()
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    raise UsageError(
        f"no suite is called '{text}', and no file is there. {did_you_mean(text, known)} A path ends in .yaml."
    )
