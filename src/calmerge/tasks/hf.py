"""Hugging Face classifiers as one model of several tasks, and suites opened as task vectors and tasks."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import functional_call

from calmerge._checkpoint import Checkpoint
from calmerge._errors import CheckpointError, DataError
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors, own_names, task_vectors
from calmerge.tasks.base import Outputs, Task, Tasks
from calmerge.tasks.data import read_examples

if TYPE_CHECKING:
    from calmerge.suites.suite import Kind, Suite, SuiteTask


class HuggingFaceModel:
    """Classifiers of one architecture whose backbone is merged and whose heads are kept.

    logits = head_t(backbone(inputs; weights)); tensors that are not merged are the base's.

    Args:
        tvs: task vectors over folders that `transformers` wrote; their heads become the tasks' heads.
        kind: `sequence-classifier`, `image-classifier`, or `sentence-encoder` (mean of the token states, scaled to
            length 1, and a linear head).
        classes: by task, the names of the classes.
        device: where the model computes.

    The module is opened once and its merged tensors are emptied: beside the weights it is called with, it holds only
    what is not merged, and the heads.

    Raises:
        CheckpointError: an expert is no such folder.
        DataError: a head is missing, or its width is not the number of classes.
    """

    def __init__(
        self,
        tvs: TaskVectors,
        *,
        kind: "Kind",
        classes: Mapping[str, Sequence[str]],
        device: str | torch.device = "cpu",
    ) -> None:
        from calmerge.suites.finetune import open_model

        first = tvs.tasks[0]
        self._prefix = "encoder." if kind == "sentence-encoder" else ""
        self._names = {base: self._own(own) for base, own in own_names(tvs, first).items()}
        self._module = open_model(_folder(tvs, first), kind, classes[first]).requires_grad_(False)
        self._heads = {
            task: {self._own(name): w.float().to(device) for name, w in tvs.heads.get(task, {}).items()}
            for task in tvs.tasks
        }
        for task, head in self._heads.items():
            _check_head(task, head, len(classes[task]))
        self._empty(tvs)
        self._module.to(device)
        self._given: list[Tensor] = []
        self._head_module().register_forward_pre_hook(lambda module, args: self._given.append(args[0]))

    @property
    def module(self) -> torch.nn.Module:
        """The classifier, its merged tensors empty."""
        return self._module

    @property
    def names(self) -> Mapping[str, str]:
        """By the name of a merged tensor, its name in the module."""
        return self._names

    def logits(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Tensor:
        """Class scores [n, classes]."""
        return self.outputs(weights, inputs, task).logits

    def outputs(self, weights: Mapping[str, Tensor], inputs: Any, task: str) -> Outputs:
        """Class scores, and what the head's module is given."""
        named = {self._names[name]: w for name, w in weights.items() if name in self._names}
        output = functional_call(self._module, named | self._heads[task], (), dict(inputs))
        return Outputs(getattr(output, "logits", output), self._given.pop())

    def head(self, features: Tensor, task: str) -> Tensor:
        """Class scores [n, classes] of what the head's module is given."""
        inner = len(self._head_path()) + 1
        own = {name[inner:]: w for name, w in self._heads[task].items()}
        scores: Tensor = functional_call(self._head_module(), own, (features,))
        self._given.pop()
        return scores

    def _head_module(self) -> torch.nn.Module:
        """The innermost module that holds all tensors of a head."""
        return self._module.get_submodule(self._head_path())

    def _head_path(self) -> str:
        paths = [name.split(".")[:-1] for name in next(iter(self._heads.values()))]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        return ".".join(parts[0] for parts in shared)

    def _own(self, name: str) -> str:
        return name if name.startswith("head.") else self._prefix + name

    def _empty(self, tvs: TaskVectors) -> None:
        """Take merged tensors and heads out of the module, and put the base's into what is left."""
        tensors = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        heads = {name for head in self._heads.values() for name in head}
        for base, name in self._names.items():
            if base in tvs.specs:
                tensors[name].data = torch.empty(0)
            elif name in tensors and name not in heads:
                tensors[name].data = tvs.base.read(base).to(tensors[name].dtype).clone()
        for name in heads:
            if name not in tensors:
                raise CheckpointError(f"the experts have a tensor '{name}' that their architecture does not know.")
            tensors[name].data = torch.empty(0)


def open_suite(
    suite: "Suite", *, names: Sequence[str] | None = None, run: Run | None = None, device: str = "cpu"
) -> tuple[TaskVectors, Tasks]:
    """The task vectors of a suite's experts, and its tasks with their data.

    Args:
        suite: as `load_suite` gives it; its files must be there.
        names: only these tasks.
        run: progress.
        device: where the model computes.

    Raises:
        CheckpointError: checkpoints that cannot be read or do not fit.
        DataError: data that cannot be read, a split that is empty or too small.
    """
    run = run or Run()
    chosen = {name: suite.tasks[name] for name in (names or suite.tasks)}
    tvs = task_vectors(suite.base, {n: t.expert for n, t in chosen.items()}, exclude=suite.exclude, heads=suite.heads)
    classes = {name: tuple(task.classes) for name, task in chosen.items()}
    model = HuggingFaceModel(tvs, kind=suite.model.kind, classes=classes, device=device)
    tasks = {}
    with run.progress.track("reading data", len(chosen), "task") as bar:
        for name, task in chosen.items():
            tasks[name] = _task(suite, task, _folder(tvs, name))
            bar.advance(1, task=name)
    autocast = torch.bfloat16 if suite.model.autocast == "bfloat16" else None
    return tvs, Tasks(model, tasks, device=device, autocast=autocast)


def _task(suite: "Suite", task: "SuiteTask", folder: Path) -> Task:
    def split(source: Path | str | None, label: str | None) -> Any:
        if source is None:
            return None
        return read_examples(
            source,
            folder,
            kind=suite.model.kind,
            input=task.input,
            label=label,
            classes=task.classes,
            max_tokens=suite.model.max_tokens or 128,
        )

    return Task(
        pool=split(task.pool, None),
        test=split(task.test, task.label),
        validation=split(task.validation, task.label),
        classes=tuple(task.classes),
        transductive=suite.transductive,
    )


def _folder(tvs: TaskVectors, task: str) -> Path:
    expert = getattr(tvs.experts[task], "source", tvs.experts[task])
    if not isinstance(expert, Checkpoint) or expert.folder is None:
        raise CheckpointError(f"expert '{task}' is no model folder with a config.json; its data cannot be run on it.")
    return expert.folder


def _check_head(task: str, head: Mapping[str, Tensor], classes: int) -> None:
    if not head:
        raise DataError(f"task '{task}': its expert has no head (no tensor of its own); a classifier is expected.")
    last = list(head.values())[-1]
    widths = {len(w) for w in head.values() if w.dim() >= 1}
    if classes not in widths:
        raise DataError(f"task '{task}': the head has {len(last)} outputs, but {classes} classes are named.")
