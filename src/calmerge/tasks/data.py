"""Task data: tables, image folders and `datasets` ids read into indexable examples.

A source is one of

- a path to a table: `.csv`, `.tsv`, `.jsonl` or `.parquet`, with named columns;
- a path to a folder with one sub-folder of images per class (or, for a pool without labels, images alone);
- a `datasets` id with a split: `"ag_news:train[:500]"`, `"glue#sst2:validation"` (`#` names the configuration).

What is read becomes an `Examples`: `len(examples)` and `examples.batch(indices) -> (inputs, labels or
None)`. A split read without `label` never touches its label column.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calmerge._errors import DataError, MissingExtra, UsageError, did_you_mean
from calmerge.tasks.fingerprint import fingerprint
from calmerge.tasks.images import ImageExamples, preprocessing
from calmerge.tasks.tables import Source, read_image_folder, read_table

Unpack = Callable[[Any], tuple[Any, Tensor | None]]


def read_examples(
    source: Source,
    model: Path,
    *,
    kind: Literal["sequence-classifier", "sentence-encoder", "image-classifier"],
    input: str | None = None,
    label: str | None = None,
    classes: Sequence[str] = (),
    max_tokens: int = 128,
) -> "TextExamples | ImageExamples":
    """One split, ready for a model of this kind.

    Args:
        source: table, image folder, or `datasets` id (see the module's text).
        model: folder with the tokenizer, or with `preprocessor_config.json` and `config.json` for images.
        kind: what the model takes; texts for the first two, images for the last.
        input: column of the input; "text" or "image" if not given. Not used for image folders.
        label: column of the labels, integer ids or class names; None reads no labels. For an image folder
            any value but None reads the names of the sub-folders.
        classes: the class names, in the order of the ids.
        max_tokens: longer texts are cut here.

    Raises:
        DataError: a missing file or column, an empty split, an impossible label, an image that cannot be
            read.
        MissingExtra: pyarrow, datasets, transformers or Pillow is needed and not installed.
    """
    if kind == "image-classifier":
        column = input or "image"
        images, labels = read_columns(source, column, label, classes)
        return ImageExamples(images, labels, preprocessing(model), where=f"{source}, column '{column}'")
    column = input or "text"
    texts, labels = read_columns(source, column, label, classes)
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str):
            found = "nothing" if text is None else type(text).__name__
            raise DataError(f"{source}: row {row}, column '{column}': expected a text, found {found}.")
    return TextExamples(texts, labels, load_tokenizer(model), max_tokens=max_tokens)


def read_columns(
    source: Source, input: str, label: str | None = None, classes: Sequence[str] = ()
) -> tuple[list[Any], Tensor | None]:
    """The column of inputs and, if `label` names a column, its labels as class ids (int64, [N])."""
    path = Path(source)
    if path.is_dir():
        inputs, names = read_image_folder(path, labelled=label is not None)
        values: list[Any] | None = names if label is not None else None
        if label is not None and not classes:
            classes = sorted(set(names))
    else:
        wanted = [input] if label is None else [input, label]
        table = read_table(source, wanted)
        inputs, values = table[input], None if label is None else table[label]
    if not inputs:
        raise DataError(f"{source}: the split is empty. Expected at least one row.")
    if values is None or label is None:
        return inputs, None
    return inputs, class_ids(values, classes, where=f"{source}", column=label)


def class_ids(values: Sequence[Any], classes: Sequence[str], *, where: str, column: str) -> Tensor:
    """Labels, given as ids or as class names, as int64 ids.

    >>> class_ids(["cat", "dog", "1"], ["cat", "dog"], where="pets.csv", column="label")
    tensor([0, 1, 1])
    >>> class_ids([2], ["cat", "dog"], where="pets.csv", column="label")
    Traceback (most recent call last):
    ...
    calmerge._errors.DataError: pets.csv: row 1, column 'label': class id 2 is outside 0..1 (2 classes).
    """
    if not classes:
        raise UsageError(
            f"{where}: column '{column}' holds labels, so name the classes (`classes:`) in the order of their ids."
        )
    known = {name: index for index, name in enumerate(classes)}
    ids = torch.empty(len(values), dtype=torch.int64)
    for row, value in enumerate(values, 1):
        if isinstance(value, str) and value in known:
            ids[row - 1] = known[value]
            continue
        index = _as_integer(value)
        at = f"{where}: row {row}, column '{column}'"
        if value is None or value == "":
            raise DataError(f"{at}: the label is missing.")
        if index is None:
            raise DataError(f"{at}: no class is named {value!r}. {did_you_mean(str(value), classes)}")
        if not 0 <= index < len(classes):
            raise DataError(f"{at}: class id {index} is outside 0..{len(classes) - 1} ({len(classes)} classes).")
        ids[row - 1] = index
    return ids


def load_tokenizer(model: Path) -> Any:
    """The tokenizer of a model folder or hub id."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("transformers", "hf") from None
    return AutoTokenizer.from_pretrained(str(model))


def from_loader(loader: "torch.utils.data.DataLoader[Any]", unpack: Unpack | None = None) -> "DatasetExamples":
    """The dataset behind a `DataLoader`, with the loader's own collating; its order is not used."""
    return DatasetExamples(loader.dataset, loader.collate_fn, unpack)


class TextExamples:
    """Texts, tokenised once.

    Args:
        texts: N texts.
        labels: class ids, int64, [N]; None for an unlabelled pool.
        tokenizer: a Hugging Face tokenizer.
        max_tokens: longer texts are cut here, at least 3.

    A batch holds `input_ids`, `attention_mask` and, if the tokenizer gives them, `token_type_ids`, each
    int64 and padded to the longest text of the batch only. `lengths` ([N]) helps to batch texts of like
    length together.
    """

    def __init__(self, texts: Sequence[str], labels: Tensor | None, tokenizer: Any, *, max_tokens: int = 128) -> None:
        if not texts:
            raise DataError("the split is empty. Expected at least one text.")
        encoded = tokenizer(
            list(texts), truncation=True, max_length=max_tokens, padding=True, return_attention_mask=True
        )
        self.inputs: dict[str, Tensor] = {
            name: torch.tensor(values, dtype=torch.int32) for name, values in encoded.items()
        }
        self.labels = labels
        self.lengths = self.inputs["attention_mask"].sum(1)
        self.fingerprint = fingerprint([*(t.numpy().tobytes() for t in self.inputs.values()), labels])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The inputs of these rows, trimmed to the columns that hold a token, and their labels."""
        used = self.inputs["attention_mask"][indices].any(0)
        inputs = {name: values[indices][:, used].long() for name, values in self.inputs.items()}
        return inputs, None if self.labels is None else self.labels[indices]


class DatasetExamples:
    """Any indexable dataset as examples.

    Args:
        dataset: has `len()` and `[]`.
        collate_fn: a list of items to one batch; torch's default if None.
        unpack: a batch to `(inputs, labels or None)`; by default a pair is taken apart, and a mapping gives
            up its "labels" or "label".
    """

    def __init__(
        self, dataset: Any, collate_fn: Callable[[list[Any]], Any] | None = None, unpack: Unpack | None = None
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{type(dataset).__name__} has no length or index; calmerge draws batches of its own, "
                "so give a dataset with both."
            )
        self.dataset = dataset
        self.collate_fn = collate_fn or torch.utils.data.default_collate
        self.unpack = unpack or _pair_or_mapping

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> tuple[Any, Tensor | None]:
        """These items, collated."""
        return self.unpack(self.collate_fn([self.dataset[int(index)] for index in indices]))


def _as_integer(value: Any) -> int | None:
    try:
        index = int(value)
    except (TypeError, ValueError):
        return None
    return index if index == float(value) else None


def _pair_or_mapping(batch: Any) -> tuple[Any, Tensor | None]:
    if isinstance(batch, Mapping):
        rest = dict(batch)
        found = [rest.pop(key) for key in ("labels", "label") if key in rest]
        return rest, found[0] if found else None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    if isinstance(batch, Tensor):
        return batch, None
    raise DataError(
        f"a batch of type {type(batch).__name__} is neither (inputs, labels) nor a mapping; "
        "give `unpack=` to take it apart."
    )
