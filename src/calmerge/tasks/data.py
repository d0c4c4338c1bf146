"""Task data: tables, image folders and `datasets` ids read into indexable examples.

A source is one of

- a path to a table: `.csv`, `.tsv`, `.jsonl` or `.parquet`, with named columns;
- a path to a folder with one sub-folder of images per class (or, for a pool without labels, images alone);
- a `datasets` id with a split: `"ag_news:train[:500]"`, `"glue#sst2:validation"` (`#` names the configuration).

What is read becomes an `Examples`: `len(examples)` and `examples.batch(indices) -> (inputs, labels or
None)`. A split read without `label` never touches its label column.
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from calmerge._errors import DataError, MissingExtra, UsageError, did_you_mean

Source = str | Path
Table = dict[str, list[Any]]

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
KEEP_DECODED = 1 << 28  # bytes of decoded images that one split may keep in memory


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
        inputs, names = _read_image_folder(path, labelled=label is not None)
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


def read_table(source: Source, columns: Sequence[str]) -> Table:
    """The named columns of a table, whole; other columns are not read (Parquet) or dropped (CSV, JSONL)."""
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in TABLES or isinstance(source, Path):
        if not path.is_file():
            raise DataError(f"{source}: no such file.{_neighbours(path)}")
        readers: dict[str, Callable[[Path, Sequence[str]], Table]] = {
            ".csv": _read_csv,
            ".tsv": _read_csv,
            ".jsonl": _read_jsonl,
            ".parquet": _read_parquet,
        }
        if suffix not in readers:
            raise DataError(f"{source}: do not know how to read '{suffix}' files. Expected one of {', '.join(TABLES)}.")
        return readers[suffix](path, columns)
    return _read_datasets(source, columns)


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


def preprocessing(model: Path) -> dict[str, Any]:
    """`preprocessor_config.json` of a model folder, with `num_channels` from its `config.json`."""
    file = Path(model) / "preprocessor_config.json"
    if not file.is_file():
        raise DataError(
            f"{model}: no preprocessor_config.json, so it is unknown how images are scaled. "
            "Copy the one of the base model."
        )
    settings: dict[str, Any] = json.loads(file.read_text())
    config = Path(model) / "config.json"
    channels = json.loads(config.read_text()).get("num_channels", 3) if config.is_file() else 3
    return {"num_channels": channels} | settings


def from_loader(loader: "torch.utils.data.DataLoader[Any]", unpack: "Unpack | None" = None) -> "DatasetExamples":
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
        self.fingerprint = _fingerprint([*(t.numpy().tobytes() for t in self.inputs.values()), labels])

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The inputs of these rows, trimmed to the columns that hold a token, and their labels."""
        used = self.inputs["attention_mask"][indices].any(0)
        inputs = {name: values[indices][:, used].long() for name, values in self.inputs.items()}
        return inputs, None if self.labels is None else self.labels[indices]


class ImageExamples:
    """Images, decoded when they are first asked for.

    Args:
        images: N images: paths, encoded bytes, or `{"bytes": ..., "path": ...}` as `datasets` writes them,
            or PIL images.
        labels: class ids, int64, [N]; None for an unlabelled pool.
        settings: the fields of `preprocessor_config.json` (do_resize, size, do_center_crop, crop_size,
            do_rescale, rescale_factor, do_normalize, image_mean, image_std, resample) and `num_channels` (1
            or 3).
        where: said in errors.

    A batch holds `pixel_values`, float32, [N, channels, height, width]. Decoded images are kept if the split
    fits 256 MB.
    """

    def __init__(
        self, images: Sequence[Any], labels: Tensor | None, settings: Mapping[str, Any], *, where: str = "images"
    ) -> None:
        if not images:
            raise DataError(f"{where}: the split is empty. Expected at least one image.")
        self.images = list(images)
        self.labels = labels
        self.settings = settings
        self.where = where
        self._decoded: dict[int, Tensor] = {}
        self.fingerprint = _fingerprint([*(_image_key(image) for image in self.images), labels])

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """The pixels of these images and their labels."""
        pixels = torch.stack([self._pixels(int(index)) for index in indices])
        return {"pixel_values": pixels}, None if self.labels is None else self.labels[indices]

    def _pixels(self, index: int) -> Tensor:
        if index in self._decoded:
            return self._decoded[index]
        pixels = image_tensor(open_image(self.images[index], f"{self.where}, row {index + 1}"), self.settings)
        if pixels.nbytes * len(self.images) <= KEEP_DECODED:
            self._decoded[index] = pixels
        return pixels


Unpack = Callable[[Any], tuple[Any, Tensor | None]]


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


def open_image(image: Any, where: str) -> Any:
    """A PIL image from a path, bytes or the struct that `datasets` stores."""
    try:
        import PIL.Image
    except ImportError:
        raise MissingExtra("pillow", "data") from None
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    try:
        opened = PIL.Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        opened.load()
    except FileNotFoundError:
        raise DataError(f"{where}: no such image: {image}.") from None
    except (OSError, AttributeError, TypeError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: the image cannot be read ({error}).") from None
    return opened


def image_tensor(image: Any, settings: Mapping[str, Any]) -> Tensor:
    """A PIL image scaled as a `preprocessor_config.json` says: float32, [channels, height, width]."""
    import numpy
    import PIL.Image

    image = image.convert("L" if settings.get("num_channels", 3) == 1 else "RGB")
    resample = PIL.Image.Resampling(settings.get("resample", PIL.Image.Resampling.BILINEAR))
    if settings.get("do_resize", True) and settings.get("size"):
        image = image.resize(_target_size(image.size, settings["size"]), resample)
    if settings.get("do_center_crop", False):
        height, width = _height_width(settings.get("crop_size") or settings["size"])
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(numpy.array(image, dtype=numpy.float32))
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()
    if settings.get("do_rescale", True):
        pixels = pixels * settings.get("rescale_factor", 1 / 255)
    if settings.get("do_normalize", True):
        mean = torch.tensor(settings.get("image_mean", 0.5), dtype=torch.float32).reshape(-1, 1, 1)
        std = torch.tensor(settings.get("image_std", 0.5), dtype=torch.float32).reshape(-1, 1, 1)
        pixels = (pixels - mean) / std
    return pixels


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    return size["height"], size["width"]


def _target_size(size: tuple[int, int], target: int | Mapping[str, int]) -> tuple[int, int]:
    """PIL's (width, height) of a resized image; `shortest_edge` keeps the proportions."""
    if isinstance(target, Mapping) and "shortest_edge" in target:
        factor = target["shortest_edge"] / min(size)
        return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
    height, width = _height_width(target)
    return width, height


def _as_integer(value: Any) -> int | None:
    try:
        index = int(value)
    except (TypeError, ValueError):
        return None
    return index if index == float(value) else None


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = [p.name for p in path.parent.iterdir()]
    return " " + did_you_mean(path.name, names) if names else ""


def _require(columns: Sequence[str], found: Sequence[str], source: Source) -> None:
    for column in columns:
        if column not in found:
            raise DataError(f"{source}: no column '{column}'. {did_you_mean(column, found)}")


def _read_csv(path: Path, columns: Sequence[str]) -> Table:
    limit = csv.field_size_limit(1 << 30)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            _require(columns, reader.fieldnames or [], path)
            rows = [[row[column] for column in columns] for row in reader]
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    finally:
        csv.field_size_limit(limit)
    return {column: [row[i] for row in rows] for i, column in enumerate(columns)}


def _read_jsonl(path: Path, columns: Sequence[str]) -> Table:
    table: Table = {column: [] for column in columns}
    for row, record in enumerate(_json_lines(path), 1):
        for column in columns:
            if column not in record:
                hint = did_you_mean(column, record)
                raise DataError(f"{path}: row {row} has no column '{column}'. {hint}")
            table[column].append(record[column])
    return table


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}: line {number} is not JSON ({error.msg}).") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}: line {number}: expected an object, found {type(record).__name__}.")
            yield record


def _read_parquet(path: Path, columns: Sequence[str]) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("pyarrow", "data") from None
    try:
        with parquet.ParquetFile(path) as file:
            _require(columns, file.schema_arrow.names, path)
            table = file.read(columns=list(columns))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]}).") from None
    return {column: table.column(column).to_pylist() for column in columns}


def _read_datasets(source: Source, columns: Sequence[str]) -> Table:
    """A split of a `datasets` id, `"id:split"` or `"id#configuration:split"`."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "data") from None
    name, colon, split = str(source).partition(":")
    name, _, configuration = name.partition("#")
    if not colon:
        raise DataError(
            f"{source}: no such file; and as a `datasets` id it needs a split, for example '{source}:train'."
        )
    try:
        loaded = datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        raise DataError(f"{source}: could not be loaded by `datasets` ({error}).") from error
    _require(columns, loaded.column_names, source)
    return {column: list(loaded[column]) for column in columns}


def _read_image_folder(folder: Path, *, labelled: bool) -> tuple[list[Any], list[Any]]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise DataError(f"{folder}: no images found. Expected files such as {folder / 'CLASS' / 'name.png'}.")
    loose = [p for p in files if p.parent == folder]
    if labelled and loose:
        raise DataError(f"{loose[0]}: lies in no class's sub-folder. Expected {folder / 'CLASS' / loose[0].name}.")
    return list(files), [p.relative_to(folder).parts[0] for p in files]


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


def _image_key(image: Any) -> bytes:
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    return image.tobytes() if hasattr(image, "tobytes") else str(image).encode()


def _fingerprint(parts: Sequence[bytes | Tensor | None]) -> str:
    """sha256 over inputs and labels; says whether two splits are the same."""
    digest = hashlib.sha256()
    for part in parts:
        data = b"" if part is None else part if isinstance(part, bytes) else part.numpy().tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
