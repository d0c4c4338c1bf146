"""The making of experts: one plain training loop for text and image classifiers.

An expert is a folder as `transformers` saves it (weights in float32, the head with its class names in the
configuration, tokenizer or image settings beside it) with an `expert.json` that says how it was made.
`finetune` makes one, `make_experts` all of a suite.
"""

import fnmatch
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calmerge._errors import DataError, FitError, UsageError, did_you_mean
from calmerge._run import Run
from calmerge._signature import Count, DropRate, NonNegative, Positive, Seed
from calmerge.suites._fetch import sha256
from calmerge.suites.classifiers import (
    HEAD_FILE,
    Kind,
    Module,
    SentenceClassifier,
    accuracy,
    features,
    fit_linear,
    head_names,
    labelled,
    last_linear,
    logits_of,
)
from calmerge.suites.classifiers import open_model as open_model
from calmerge.tasks.base import Examples
from calmerge.tasks.data import read_examples

BESIDE = ("tokenizer*", "vocab*", "special_tokens_map.json", "merges.txt", "*.model", "preprocessor_config.json")


@dataclass(frozen=True)
class Finetune:
    """How an expert is trained.

    Args:
        epochs: passes over the training split, at least 1.
        batch: examples per step.
        lr: peak learning rate of the backbone.
        head_lr: peak learning rate of the head; not used with `head="first"`.
        warmup: fraction of the steps over which both rates rise from 0, in [0, 1); then they follow half a
            cosine down to 0.
        schedule: "cosine", or "constant" after the warm-up.
        weight_decay: decoupled decay of matrices (vectors have none).
        dropout: whether the model's dropout acts; without it a step on a processor takes about two thirds of the time.
        label_smoothing: weight of the uniform distribution in the targets, in [0, 1).
        autocast: "bfloat16" computes matrix products in bfloat16 (weights stay float32); "none" in float32.
        head: "fresh" trains a new head together with the backbone; "first" fits the head on the frozen base,
            freezes it, then trains the backbone, as with CLIP.
        head_l2: weight of |W|^2 / 2 when the head is fitted first.
        train: patterns (fnmatch) of the backbone's parameters that are trained; the others stay as in the
            base.
        seed: of the head's start, the order of examples and dropout.
    """

    epochs: Count = 3
    batch: Count = 32
    lr: Positive = 1e-4
    head_lr: Positive = 1e-3
    warmup: DropRate = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: NonNegative = 0.01
    dropout: bool = True
    label_smoothing: DropRate = 0.0
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    head: Literal["fresh", "first"] = "fresh"
    head_l2: NonNegative = 1e-3
    train: Sequence[str] = ("*",)
    seed: Seed = 0

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> "Finetune":
        """From the `finetune:` part of a suite.

        >>> Finetune.parse({"epochs": 2, "lr": 5e-5}).epochs
        2
        >>> Finetune.parse({"epoch": 2})
        Traceback (most recent call last):
        ...
        calmerge._errors.UsageError: finetune: unknown option 'epoch'. Did you mean 'epochs'?
        """
        known = {field.name: field for field in fields(cls)}
        for name in options:
            if name not in known:
                raise UsageError(f"finetune: unknown option '{name}'. {did_you_mean(name, known)}")
        values = dict(options)
        for name, value in options.items():
            if known[name].type in (float, "float"):
                values[name] = float(value)  # YAML reads 1e-4 (no dot) as a text
        if "train" in values:
            values["train"] = tuple(values["train"])
        return cls(**values)


def finetune(
    base: Path,
    out: Path,
    train: Examples,
    validation: Examples | None,
    *,
    kind: Kind,
    classes: Sequence[str],
    settings: Finetune | None = None,
    seed: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Train one expert from a base and write it to `out`; what `expert.json` holds is returned.

    The loss is the cross entropy, the optimiser AdamW, gradients are clipped to norm 1. Texts of like length
    share a batch. The folder appears only when it is complete.

    Args:
        base: Hugging Face folder of the base.
        out: folder of the expert; an older one is replaced.
        train: labelled examples.
        validation: labelled examples for the accuracy on record; None for none.
        kind: "sequence-classifier" and "image-classifier" are what `AutoModelFor...Classification` opens;
            "sentence-encoder" is an encoder with L2-normalised mean pooling and a linear head in `head.safetensors`.
        classes: class names in the order of the ids.
        settings: see `Finetune`.
        seed: replaces `settings.seed`.
        recipe: goes into `expert.json` as it is; `make_experts` compares it to see whether an expert is up
            to date.
        run: progress.

    Raises:
        DataError: examples without labels.
        FitError: a loss that is not finite.
    """
    settings = settings or Finetune()
    run = run or Run()
    seed = settings.seed if seed is None else seed
    started = time.monotonic()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_model(base, kind, classes)
        head = head_names(model)
        if settings.head == "first":
            _fit_head_first(model, head, train, settings, run)
        _train(model, head, train, settings, seed, out.name, run)
    record = {
        "kind": kind,
        "classes": list(classes),
        "seed": seed,
        "settings": asdict(settings),
        "examples": len(train),
        "train_sha256": getattr(train, "fingerprint", None),
        "validation_accuracy": None if validation is None else accuracy(model, validation),
        "seconds": round(time.monotonic() - started, 1),
        "recipe": dict(recipe or {}),
    }
    _save(model, base, out, kind, record)
    return record


def make_experts(
    suite: Mapping[str, Any], folder: Path, names: Sequence[str] | None = None, *, run: Run | None = None
) -> dict[str, dict[str, Any]]:
    """Make the experts of a suite that are missing or were made by another recipe; return each one's
    `expert.json`.

    Args:
        suite: the suite's YAML as a mapping (keys model, base, tasks, finetune).
        folder: where its relative paths start.
        names: the tasks to make; all if None.
        run: progress.
    """
    run = run or Run()
    from calmerge.suites.suite import located_data

    kind: Kind = suite["model"]["kind"]
    made: dict[str, dict[str, Any]] = {}
    base = folder / suite["base"]
    for name in names if names is not None else list(suite["tasks"]):
        if name not in suite["tasks"]:
            raise UsageError(f"no task '{name}' in the suite. {did_you_mean(name, suite['tasks'])}")
        task = suite["tasks"][name]
        if "train" not in task:
            raise DataError(f"task '{name}': no `train` split, so its expert cannot be made.")
        out = folder / task["expert"]
        splits = {
            split: read_examples(
                located_data(task[split], folder),
                base,
                kind=kind,
                input=task.get("input"),
                label=task.get("label", "label"),
                classes=[str(c) for c in task["classes"]],
                max_tokens=suite["model"].get("max_tokens", 128),
            )
            for split in ("train", "validation")
            if split in task
        }
        own = Finetune.parse({**suite.get("finetune", {}), **task.get("finetune", {})})
        recipe = {
            "settings": _plain(asdict(own)),
            "data": {k: v.fingerprint for k, v in splits.items()},
            "base": _weights_key(base),
        }
        kept = _record(out)
        if kept is not None and kept.get("recipe") == recipe:
            made[name] = kept
            continue
        made[name] = finetune(
            base,
            out,
            splits["train"],
            splits.get("validation"),
            kind=kind,
            classes=[str(c) for c in task["classes"]],
            settings=own,
            recipe=recipe,
            run=run,
        )
    return made


def learning_rate(step: int, steps: int, settings: Finetune) -> float:
    """Factor on the peak rate at a step counted from 0: a linear rise, then half a cosine down to 0.

    >>> [round(learning_rate(s, 10, Finetune(warmup=0.2)), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 0.96, 0.85, 0.69, 0.5, 0.31, 0.15, 0.04]
    """
    rise = math.ceil(settings.warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _train(model: Module, head: list[str], train: Examples, settings: Finetune, seed: int, name: str, run: Run) -> None:
    groups = _parameter_groups(model, head, settings)
    parameters = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, fused=True)
    peaks = [group["lr"] for group in optimiser.param_groups]
    order = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(train) / settings.batch)
    steps = settings.epochs * per_epoch
    model.train(settings.dropout)
    with run.progress.track(f"fine-tuning {name}", steps) as bar:
        for step, indices in enumerate(_shuffled(train, settings, order)):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * learning_rate(step, steps, settings)
            inputs, labels = labelled(train.batch(indices))
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast == "bfloat16"):
                logits = logits_of(model, inputs)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            if not torch.isfinite(loss):
                raise FitError(f"{name}: the loss is {loss.item()} at step {step}. Lower the learning rate.")
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            bar.advance(1, loss=round(loss.item(), 3))
    model.eval()


def _parameter_groups(model: Module, head: list[str], settings: Finetune) -> list[dict[str, Any]]:
    """Backbone and head, matrices and vectors, each with its rate and decay; the rest is frozen."""
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    members: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_head = name in head
        wanted = settings.head == "fresh" if in_head else _matches(name.removeprefix(prefix), settings.train)
        parameter.requires_grad_(wanted)
        if wanted:
            rate = settings.head_lr if in_head else settings.lr
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            members.setdefault((rate, decay), []).append(parameter)
    if not members:
        raise UsageError(f"finetune: no parameter of the model matches train={list(settings.train)}.")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in members.items()]


def _fit_head_first(model: Module, head: list[str], train: Examples, settings: Finetune, run: Run) -> None:
    last = last_linear(model)
    x, y = features(model, train)
    weight, bias = fit_linear(x, y, last.out_features, settings.head_l2)
    with torch.no_grad():
        last.weight.copy_(weight)
        last.bias.copy_(bias)


def _shuffled(train: Examples, settings: Finetune, order: torch.Generator) -> Iterator[Tensor]:
    """Batches of every epoch in random order; where lengths are known, texts of like length together."""
    lengths = getattr(train, "lengths", None)
    for _ in range(settings.epochs):
        indices = torch.randperm(len(train), generator=order)
        if lengths is not None:
            pieces = torch.split(indices, 16 * settings.batch)
            indices = torch.cat([piece[lengths[piece].argsort(stable=True)] for piece in pieces])
        batches = torch.split(indices, settings.batch)
        for i in torch.randperm(len(batches), generator=order).tolist():
            yield batches[i]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _save(model: Module, base: Path, out: Path, kind: Kind, record: Mapping[str, Any]) -> None:
    """Write the folder under a temporary name, then rename it."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    saved: Any = model
    if isinstance(model, SentenceClassifier):
        from safetensors.torch import save_file

        save_file({f"head.{k}": v.contiguous() for k, v in model.head.state_dict().items()}, partial / HEAD_FILE)
        saved = model.encoder
        saved.config.id2label = dict(enumerate(record["classes"]))
        saved.config.label2id = {name: index for index, name in enumerate(record["classes"])}
    saved.save_pretrained(partial)
    for file in sorted(base.iterdir()):
        if _matches(file.name, BESIDE) and not (partial / file.name).exists():
            shutil.copyfile(file, partial / file.name)
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(partial.iterdir())}
    (partial / "expert.json").write_text(json.dumps({**record, "files": files}, indent=1) + "\n")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)


def _record(expert: Path) -> dict[str, Any] | None:
    file = expert / "expert.json"
    if not file.is_file():
        return None
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def _plain(value: Any) -> Any:
    """As JSON would give it back, so that recipes compare equal."""
    return json.loads(json.dumps(value))


def _weights_key(base: Path) -> str:
    """sha256 of the base's weights."""
    return "-".join(sha256(file) for file in sorted(base.glob("*.safetensors")))
