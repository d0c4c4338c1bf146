"""The index of a checkpoint in several files: which file holds which tensor, and whether that is so."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from calmerge._errors import CheckpointError
from calmerge._header import repeated


def read_index(index: Path) -> dict[str, str]:
    """By tensor, the name of its file, as an `*.index.json` says.

    Raises:
        CheckpointError: it is no index, names a tensor twice, or names something else than files of its own folder.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        found = content["weight_map"]
        if not found or not all(isinstance(name, str) for name in found.values()):
            raise TypeError("weight_map must give a file's name for every tensor")
    except OSError as e:
        raise CheckpointError(f"{index}: cannot be read ({e.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(
            f"{index}: not a readable index of shards ({type(e).__name__}: {str(e)[:120]}). Download it again."
        ) from None
    for name in dict.fromkeys(found.values()):
        if name in {"", ".."} or Path(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{index}: names {name!r}, which lies outside the folder. Refused.")
    return dict(found)


def shard_files(index: Path, weight_map: Mapping[str, str]) -> list[Path]:
    """The files that an index names, in its order; each is there, and in the folder.

    A link may lead within the folder, or to the blobs of the hub cache that the folder belongs to, not elsewhere.

    Raises:
        CheckpointError: a file is missing, or a link leads elsewhere.
    """
    files = [index.parent / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = "is missing" if len(missing) == 1 else "are missing"
        raise CheckpointError(f"{index}: names {_some(missing)}, which {what}. Download the folder again.")
    homes = [index.parent.resolve(), *_blobs(index.parent.resolve())]
    for file in files:
        target = file.resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise CheckpointError(
                f"{index}: names '{file.name}', a link that lies outside the folder: it leads to {target}. "
                "Refused; copy the file into the folder, or name the folder that holds it."
            )
    return files


def check_index(index: Path, weight_map: Mapping[str, str], held: Mapping[str, Collection[str]]) -> None:
    """Nothing, if every file holds the tensors that the index gives it, and no others.

    Args:
        index: for messages.
        weight_map: the file by tensor.
        held: the names of the tensors by file.

    Raises:
        CheckpointError: it does not.
    """
    at = {name: file for file, names in held.items() for name in names}
    lacking = [name for name, file in weight_map.items() if name not in held[file]]
    more = [name for name in at if name not in weight_map]
    fault = ""
    if lacking:
        name = lacking[0]
        found = f"'{at[name]}' does" if name in at else "no file does"
        fault = f"places tensor '{name}' in '{weight_map[name]}', which does not hold it; {found}"
    elif more:
        fault = f"does not name tensor '{more[0]}', which '{at[more[0]]}' holds"
    if fault:
        others = len(lacking) + len(more) - 1
        raise CheckpointError(
            f"{index}: {fault}{f' (and {others} more like it)' if others else ''}. "
            "Index and files are of different models; download the folder again."
        )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = repeated(name for name, _ in pairs)
    if twice is not None:
        raise ValueError(f"'{twice}' stands in it twice")
    return dict(pairs)


def _blobs(folder: Path) -> Iterable[Path]:
    """Where the hub's cache keeps what `snapshots/<revision>/` links to."""
    for above in folder.parents:
        if above.name == "snapshots":
            yield above.parent / "blobs"


def _some(names: list[str]) -> str:
    """
    >>> _some(["a"]), _some(["a", "b", "c", "d"])
    ("'a'", "'a', 'b' and 2 more")
    """
    shown = ", ".join(f"'{name}'" for name in names[: 3 if len(names) == 3 else 2])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 2} more"
