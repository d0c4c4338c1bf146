"""The merged folder: backbone, one head per task, and everything needed to make it again."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calmerge._checkpoint import Checkpoint, open_checkpoint
from calmerge._errors import CheckpointError, OutputError, did_you_mean
from calmerge._run import Run
from calmerge._task_vectors import TaskVectors, own_names
from calmerge._weights import ALL, Memo, Weights, add
from calmerge._writer import MANIFEST, copy_side_files, new_folder, write_json, write_weights


def save(
    path: str | Path,
    tvs: TaskVectors,
    delta: Weights,
    *,
    dtype: torch.dtype | None = None,
    shard: str | int = "5GB",
    recipe: Mapping[str, Any] | None = None,
    card: str | None = None,
    chunk: int = 2**18,
    threads: int | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """The manifest of the folder written: the merged model, and all that is known of how it came about.

    The folder holds the backbone (`model.safetensors` or shards with an index), the base's side files, `heads/<task>/`
    with each task's own tensors and configuration (`export` makes full models of them), a model card, and
    `calmerge.json`: recipe, versions, hashes of inputs and outputs, and the tensors that were not merged, with reasons.

    Args:
        path: a folder that does not exist yet, or is empty.
        tvs: the task vectors that were merged.
        delta: what came out, lazy or not.
        dtype: floating type of the backbone; the base's when None.
        shard: the most bytes that one file holds.
        recipe: what made `delta`, for the manifest.
        card: text of README.md.
        chunk: entries computed at a time; changes no byte.
        threads: chunks computed at a time; changes no byte.
        run: progress in bytes.

    Raises:
        OutputError: the place is taken, is an input, cannot be written, or the disk is too small.
        CheckpointError: an input has entries that are NaN or infinite; nothing is left behind.

    >>> import tempfile
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> with tempfile.TemporaryDirectory() as place:
    ...     manifest = save(Path(place) / "merged", tvs, tvs.of("a"))
    ...     open_checkpoint(Path(place) / "merged")["w"]
    tensor([1., 1.])
    """
    path = Path(path)
    _check_apart(path, tvs)
    weights = add(tvs.base, delta, dtype=dtype)
    need = weights.nbytes + sum(head.nbytes for head in tvs.heads.values())
    with new_folder(path, need=need) as folder:
        copy_side_files(tvs.base, folder)
        files = write_weights(folder, weights, shard=shard, chunk=chunk, threads=threads, run=run)
        for task, head in tvs.heads.items():
            files |= _write_head(folder / "heads" / task, tvs, task, head)
        if card:
            (folder / "README.md").write_text(card)
        manifest = {
            "calmerge": _version(),
            "versions": versions(),
            "recipe": recipe,
            "inputs": {"base": hashes(tvs.base)} | {f"expert {t}": hashes(w) for t, w in tvs.experts.items()},
            "merged": len(delta),
            "not_merged": tvs.skipped,
            "tasks": list(tvs.tasks),
            "files": files,
        }
        write_json(folder / MANIFEST, manifest)
    return manifest


def export(folder: str | Path, task: str, out: str | Path, *, run: Run | None = None) -> Path:
    """The folder of one task's full model: the merged backbone, the task's head, its configuration and side files.

    What comes out opens with the same call as the expert did, e.g. `AutoModelForImageClassification.from_pretrained`.

    Args:
        folder: what `save` wrote.
        task: one of its tasks.
        out: a folder that does not exist yet, or is empty.
        run: progress in bytes.

    Raises:
        CheckpointError: `folder` is no merged folder, or has no such task.
        OutputError: `out` is taken or cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"'{folder}' is no folder that calmerge wrote: {MANIFEST} is missing.")
    tasks = json.loads((folder / MANIFEST).read_text())["tasks"]
    if task not in tasks:
        raise CheckpointError(f"'{folder}' has no task '{task}'. {did_you_mean(task, tasks)}")
    backbone = open_checkpoint(folder)
    head = folder / "heads" / task
    known = json.loads((head / "names.json").read_text())
    parts = {own: (backbone, name) for name, own in known["names"].items()}
    own_file = head / "head.safetensors"
    apart = own_file.is_file() and known["head_in_a_file_of_its_own"]
    if own_file.is_file() and not apart:
        tensors = open_checkpoint(own_file)
        parts |= {name: (tensors, name) for name in tensors}
    weights = _Gathered(parts)
    with new_folder(out, need=weights.nbytes) as partial:
        copy_side_files(backbone, partial)
        for file in sorted(head.glob("*.json")):
            if file.name != "names.json":
                (partial / file.name).write_bytes(file.read_bytes())
        write_weights(partial, weights, run=run)
        if apart:
            (partial / own_file.name).write_bytes(own_file.read_bytes())
    return out


def versions() -> dict[str, str]:
    """What an output was made with."""
    import safetensors

    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def hashes(weights: Weights) -> dict[str, str]:
    """SHA-256 of each file behind `weights`, or of the tensors themselves where there is no file."""
    import hashlib

    source = getattr(weights, "source", weights)
    if isinstance(source, Checkpoint):
        return source.hashes
    digest = hashlib.sha256()
    for name in sorted(source):
        digest.update(name.encode())
        digest.update(source.read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"tensors": digest.hexdigest()}


class _Gathered(Weights):
    """Tensors from several places, each read from its own when asked for."""

    def __init__(self, parts: Mapping[str, tuple[Weights, str]]) -> None:
        self._parts = parts
        self.inputs = tuple(source for source, _ in parts.values())
        self.specs = {own: source.specs[name] for own, (source, name) in parts.items()}
        self.elementwise = all(source.elementwise for source, _ in parts.values())

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        source, theirs = self._parts[name]
        return source.read(theirs, rows, memo)


def _write_head(folder: Path, tvs: TaskVectors, task: str, head: Weights) -> dict[str, str]:
    folder.mkdir(parents=True)
    source = getattr(tvs.experts[task], "source", tvs.experts[task])
    apart = isinstance(source, Checkpoint) and any(f.name == "head.safetensors" for f in source.files)
    write_json(folder / "names.json", {"names": own_names(tvs, task), "head_in_a_file_of_its_own": apart})
    if isinstance(source, Checkpoint) and source.folder and (source.folder / "config.json").is_file():
        (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return _write_tensors(folder / "head.safetensors", head) if len(head) else {}


def _write_tensors(path: Path, weights: Weights) -> dict[str, str]:
    from safetensors.torch import save_file

    from calmerge._checkpoint import sha256

    save_file({name: w.contiguous() for name, w in weights.items()}, path, metadata={"format": "pt"})
    return {f"heads/{path.parent.name}/{path.name}": sha256(path)}


def _check_apart(path: Path, tvs: TaskVectors) -> None:
    for label, weights in {"the base": tvs.base, **{f"expert '{t}'": w for t, w in tvs.experts.items()}}.items():
        source = getattr(weights, "source", weights)
        if isinstance(source, Checkpoint) and any(
            path.resolve() in (f.parent.resolve(), f.resolve()) for f in source.files
        ):
            raise OutputError(f"the output would overwrite {label}; name another folder.")


def _version() -> str:
    from importlib.metadata import version

    return version("calmerge")
