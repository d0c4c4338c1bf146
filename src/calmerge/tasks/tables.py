"""Tables and image folders read whole: CSV, TSV, JSONL, Parquet, `datasets` ids, sub-folders of images."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calmerge._errors import DataError, MissingExtra, did_you_mean

Source = str | Path
Table = dict[str, list[Any]]

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


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


def read_image_folder(folder: Path, *, labelled: bool) -> tuple[list[Any], list[Any]]:
    """The images below a folder, sorted, and the name of the sub-folder that each lies in."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    if not files:
        raise DataError(f"{folder}: no images found. Expected files such as {folder / 'CLASS' / 'name.png'}.")
    loose = [p for p in files if p.parent == folder]
    if labelled and loose:
        raise DataError(f"{loose[0]}: lies in no class's sub-folder. Expected {folder / 'CLASS' / loose[0].name}.")
    return list(files), [p.relative_to(folder).parts[0] for p in files]
