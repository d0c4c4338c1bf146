"""Text and image classifiers as plain modules: opened, measured, and probed with a linear head."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calmerge._errors import CheckpointError, DataError, MissingExtra
from calmerge.tasks.base import Examples

Kind = Literal["sequence-classifier", "sentence-encoder", "image-classifier"]
Module = torch.nn.Module

HEAD_FILE = "head.safetensors"


def open_model(folder: Path, kind: Kind, classes: Sequence[str]) -> Module:
    """The float32 model of a base or expert folder with a head of this many classes, in evaluation mode."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json. Expected a Hugging Face model folder.")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # "some weights were newly initialised": that is the point
    transformers.logging.disable_progress_bar()
    try:
        if kind == "sentence-encoder":
            encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
            model: Module = SentenceClassifier(encoder, len(classes))
            if (Path(folder) / HEAD_FILE).is_file():
                from safetensors.torch import load_file

                model.load_state_dict(load_file(Path(folder) / HEAD_FILE), strict=False)
            return model.eval()
        auto = {
            "sequence-classifier": transformers.AutoModelForSequenceClassification,
            "image-classifier": transformers.AutoModelForImageClassification,
        }
        id2label = dict(enumerate(classes))
        label2id = {name: index for index, name in id2label.items()}
        opened = auto[kind].from_pretrained(folder, id2label=id2label, label2id=label2id, dtype=torch.float32)
        module: Module = opened.eval()
        return module
    finally:
        transformers.logging.set_verbosity(verbosity)


class SentenceClassifier(torch.nn.Module):
    """An encoder, the mean of its token states scaled to length 1, and a linear head."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, classes)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits, [N, classes]."""
        states = self.encoder(**inputs).last_hidden_state.float()  # [N, tokens, width]
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        pooled = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        logits: Tensor = self.head(torch.nn.functional.normalize(pooled, dim=-1))
        return logits


def head_names(model: Module) -> list[str]:
    """Names of the parameters outside the backbone."""
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix)]


def logits_of(model: Module, inputs: Any) -> Tensor:
    """The model's logits, whether it returns them bare or in a record."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits.float()


def accuracy(model: Module, examples: Examples, *, batch: int = 128) -> float:
    """Fraction of right predictions, in [0, 1], computed in bfloat16 where the processor multiplies it."""
    right = 0
    model.eval()
    with torch.no_grad():
        for inputs, labels in batches(examples, batch):
            with torch.autocast("cpu", torch.bfloat16):
                logits = logits_of(model, inputs)
            right += int((logits.argmax(1) == labels).sum())
    return right / len(examples)


def features(model: Module, examples: Examples, *, batch: int = 128) -> tuple[Tensor, Tensor]:
    """What the last linear layer of the head receives, [N, width], and the labels, [N]."""
    last = last_linear(model)
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float()))
    labels = []
    model.eval()
    with torch.no_grad():
        for inputs, y in batches(examples, batch):
            logits_of(model, inputs)
            labels.append(y)
    hook.remove()
    return torch.cat(seen), torch.cat(labels)


def fit_linear(x: Tensor, y: Tensor, classes: int, l2: float, *, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: argmin_W,b mean CE(x W^T + b, y) + l2 |W|^2 / 2, by L-BFGS."""
    weight = torch.zeros(classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[arg-type, no-untyped-call]
    return weight.detach(), bias.detach()


def probe(
    base: Path,
    train: Examples,
    validation: Examples,
    test: Examples,
    *,
    kind: Kind,
    classes: Sequence[str],
    l2: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1),
) -> float:
    """Test accuracy of a linear head on the frozen base, with the `l2` that is best on validation."""
    model = open_model(base, kind, classes)
    x, y = features(model, train)
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    heads = [fit_linear((x - mean) / std, y, len(classes), strength) for strength in l2]

    def right(examples: Examples) -> list[float]:
        x, y = features(model, examples)
        return [(((x - mean) / std @ w.T + b).argmax(1) == y).double().mean().item() for w, b in heads]

    chosen = right(validation)
    return right(test)[chosen.index(max(chosen))]


def last_linear(model: Module) -> torch.nn.Linear:
    """The linear layer of the head that gives the logits."""
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    linear = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear))
    found = [module for name, module in linear if not (name + ".").startswith(prefix)]
    if not found:
        raise CheckpointError(f"{type(model).__name__}: no linear layer after the backbone, so no head to fit.")
    return found[-1]


def batches(examples: Examples, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Inputs and labels, `size` at a time, in order."""
    for indices in torch.split(torch.arange(len(examples)), size):
        yield labelled(examples.batch(indices))


def labelled(batch: tuple[Any, Tensor | None]) -> tuple[Any, Tensor]:
    """The same batch, whose labels are there."""
    inputs, labels = batch
    if labels is None:
        raise DataError("these examples have no labels; name the label column when reading them.")
    return inputs, labels
