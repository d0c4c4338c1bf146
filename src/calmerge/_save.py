"""The merged folder: backbone, one head per task, and everything needed to make it again."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors.torch import save_file

from calmerge._checkpoint import Checkpoint, open_checkpoint
from calmerge._errors import CheckpointError, OutputError, UsageError, did_you_mean
from calmerge._folder import new_folder, resumable_folder
from calmerge._hash import ALGORITHM, hash_of
from calmerge._lora import Adapted
from calmerge._merged import Merged, is_patched, open_merged, storage, write_merged, written_together
from calmerge._plan import plan
from calmerge._run import Run
from calmerge._size import bytes_of
from calmerge._task_vectors import TaskVectors, own_names
from calmerge._weights import BLOCK, Gathered, Node, Weights, add, digest
from calmerge._writer import MANIFEST, copy_side_files, write_json, write_weights


def save(
    path: str | Path,
    tvs: TaskVectors,
    delta: Weights | Merged,
    *,
    dtype: torch.dtype | None = None,
    shard: str | int = "5GB",
    recipe: Mapping[str, Any] | None = None,
    card: str | None = None,
    chunk: int = BLOCK,
    threads: int | None = None,
    max_memory: str | int | None = None,
    resume: bool = False,
    also: Callable[[Path], None] | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """The manifest of the folder written: the merged model, and all that is known of how it came about.

    The folder holds the backbone (`model.safetensors` or shards with an index), the base's side files, `heads/<task>/`
    with each task's own tensors and configuration (`export` makes full models of them), a model card, and
    `calmerge.json`: recipe, versions, hashes of inputs and outputs, and the tensors that were not merged, with reasons.
    Of a `Merged`, which has a model for each task, the backbone is the base; `shared/` holds the shared vector in
    float32, `patches/<task>/` what makes each task's own of it, and `export` adds them up.
    It appears when it is whole. What a killed run had finished is kept beside it, for a run with `resume`.

    Args:
        path: a folder that does not exist yet, or is empty.
        tvs: the task vectors that were merged.
        delta: what came out, lazy or not.
        dtype: floating type of the merged model; the base's when None. Of a `Merged` it is that of exported models.
        shard: the most bytes that one file holds.
        recipe: what made `delta`, for the manifest.
        card: text of README.md.
        chunk: entries computed at a time; changes no byte.
        threads: chunks computed at a time; changes no byte.
        max_memory: private memory that the process may take, like "2GB": fewer threads and smaller chunks keep it.
        resume: go on from what a stopped run with the same recipe and inputs left, if there is something; the bytes
            are those of an unbroken run. Needs `recipe`, which tells whether it is the same merge.
        also: called with the folder before it is whole, to write more files into it.
        run: progress in bytes.

    Raises:
        UsageError: `resume` without a recipe; `max_memory` that is too little, with what is needed.
        OutputError: the place is taken, is an input's, cannot be written, or the disk is too small; or what a stopped
            run left is of another merge.
        CheckpointError: an input has entries that are NaN or infinite; nothing is left behind.

    >>> import tempfile
    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> with tempfile.TemporaryDirectory() as place:
    ...     manifest = save(Path(place) / "merged", tvs, tvs.of("a"))
    ...     open_checkpoint(Path(place) / "merged")["w"]
    tensor([1., 1.])
    """
    path = Path(path)
    check_resume(resume, recipe)
    check_apart(path, tvs)
    patched = delta if isinstance(delta, Merged) else None
    vector = delta.shared if isinstance(delta, Merged) else delta
    weights = tvs.base if patched else add(tvs.base, vector, dtype=dtype)
    others = to_write(tvs, patched)[1:] if patched else []
    work = plan(weights, *others, shard=shard, chunk=chunk, threads=threads, max_memory=max_memory)
    need = work.writes + sum(head.nbytes for head in tvs.heads.values())
    key = None if recipe is None else key_of(tvs, recipe, weights, shard)
    with (
        resumable_folder(path, need=need, key=key, resume=resume) as (folder, journal),
        _hashing(tvs) as hashed,
    ):
        side = copy_side_files(tvs.base, folder, dtype=None if patched else dtype)
        files = write_weights(
            folder, weights, shard=shard, chunk=work.chunk, threads=work.threads, run=run, journal=journal
        )
        if patched:
            files |= write_merged(
                folder, patched, shard=shard, chunk=work.chunk, threads=work.threads, run=run, journal=journal
            )
        for task, head in tvs.heads.items():
            files |= _write_head(folder, tvs, task, head)
        if card:
            (folder / "README.md").write_text(card)
        merged = len(patched.specs if patched else vector.specs if tvs.tasks else tvs.base)
        manifest = provenance(tvs, recipe, hashed(), merged) | {"hash": ALGORITHM, "files": files | side}
        if patched:
            manifest["heads"] = patched.heads
            manifest["storage"] = storage(patched, tvs.base, tvs.experts)
            manifest["dtype"] = str(dtype).removeprefix("torch.") if dtype else None
        write_json(folder / MANIFEST, manifest)
        if also is not None:
            also(folder)
    return manifest


def provenance(
    tvs: TaskVectors, recipe: Mapping[str, Any] | None, inputs: Mapping[str, Any], merged: int
) -> dict[str, Any]:
    """What a manifest says of where its folder comes from.

    Args:
        tvs: the task vectors that were merged.
        recipe: what was done with them, where that is known.
        inputs: hashes of their files.
        merged: how many tensors came of them.
    """
    return {
        "calmerge": own_version(),
        "versions": versions(),
        "recipe": recipe,
        "inputs": inputs,
        "merged": merged,
        "not_merged": tvs.skipped,
        "tasks": list(tvs.tasks),
    }


def to_write(
    tvs: TaskVectors, delta: Weights | Merged, *, dtype: torch.dtype | None = None
) -> list[Weights | list[Weights]]:
    """What `save` writes, for `plan`: one model, or of a `Merged` the base, the shared vector and the patches."""
    if isinstance(delta, Merged):
        return [tvs.base, *(list(group.values()) for group in written_together(delta))]
    return [add(tvs.base, delta, dtype=dtype)]


def export(folder: str | Path, task: str, out: str | Path, *, run: Run | None = None) -> Path:
    """The folder of one task's full model: the merged backbone, the task's head, its configuration and side files.

    Of a folder with patches, the backbone is that of the task: base and patched vector, added in float32 and cast once.

    What comes out opens with the same call as the expert did, e.g. `AutoModelForImageClassification.from_pretrained`.
    Its `calmerge.json` has the merge's recipe and inputs, and a hash of every file for `verify`.

    Args:
        folder: what `save` wrote.
        task: one of its tasks.
        out: a folder that does not exist yet, or is empty.
        run: progress in bytes.

    Raises:
        CheckpointError: `folder` is no merged folder, or has no such task.
        UsageError: the task's model is more than weights, since its patch changes what the head is given.
        OutputError: `out` is taken or cannot be written.
    """
    folder, out = Path(folder), Path(out)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"'{folder}' is no folder that calmerge wrote: {MANIFEST} is missing.")
    manifest = json.loads((folder / MANIFEST).read_text())
    tasks = manifest.get("tasks")
    if tasks is None:
        raise CheckpointError(f"'{folder}' is one task's model already ('{manifest.get('task')}').")
    if task not in tasks:
        raise CheckpointError(f"'{folder}' has no task '{task}'. {did_you_mean(task, tasks)}")
    stored = open_checkpoint(folder)
    backbone: Weights = stored
    if is_patched(folder):
        dtype = getattr(torch, manifest["dtype"]) if manifest["dtype"] else None
        patched = open_merged(folder)
        if hasattr(patched.patches.get(task), "scores"):
            raise UsageError(
                f"'{folder}' changes what the heads are given, which the architecture of '{task}' has no place for. "
                "Score it with calmerge eval, or run it with calmerge.tasks.serving."
            )
        backbone = add(stored, patched.for_task(task), dtype=dtype)
    head = folder / "heads" / task
    known = json.loads((head / "names.json").read_text())
    parts: dict[str, tuple[Weights, str]] = {own: (backbone, name) for name, own in known["names"].items()}
    own_file = head / "head.safetensors"
    apart = own_file.is_file() and known["head_in_a_file_of_its_own"]
    if own_file.is_file() and not apart:
        tensors = open_checkpoint(own_file)
        parts |= {name: (tensors, name) for name in tensors}
    weights = Gathered(parts)
    with new_folder(out, need=weights.nbytes) as partial:
        files = copy_side_files(stored, partial)
        own = [file for file in sorted(head.glob("*.json")) if file.name != "names.json"] + (
            [own_file] if apart else []
        )
        for file in own:
            (partial / file.name).write_bytes(file.read_bytes())
            files[file.name] = hash_of(file)
        files = write_weights(partial, weights, run=run) | files
        merge = {key: manifest.get(key) for key in ("recipe", "inputs")}
        about = {"calmerge": own_version(), "versions": versions(), "task": task, "merge": merge}
        write_json(partial / MANIFEST, about | {"hash": ALGORITHM, "files": files})
    return out


def finished_before(path: Path, tvs: TaskVectors, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of the folder at `path`, if it is the whole result of this very merge."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        same = _content(manifest["recipe"]) == _content(recipe) and manifest["inputs"] == input_hashes(tvs)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if same else None


def input_hashes(tvs: TaskVectors) -> dict[str, dict[str, str]]:
    """BLAKE3 of the files of base and experts, found side by side."""
    inputs = {"base": tvs.base} | {f"expert {t}": w for t, w in tvs.experts.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(inputs, pool.map(hashes, inputs.values()), strict=True))


@contextmanager
def _hashing(tvs: TaskVectors) -> Iterator[Callable[[], dict[str, dict[str, str]]]]:
    """Begins to hash the files of all inputs beside what is done meanwhile; gives what waits for the hashes."""
    behind = {id(c): c for w in (tvs.base, *tvs.experts.values()) for c in checkpoints_behind(w)}
    pool = ThreadPoolExecutor(os.cpu_count())
    begun = [pool.submit(one.hash, file) for one in behind.values() for file in one.files]

    def hashed() -> dict[str, dict[str, str]]:
        for one in begun:
            one.result()
        return input_hashes(tvs)

    try:
        yield hashed
    finally:
        pool.shutdown(cancel_futures=True)


def versions() -> dict[str, str]:
    """What an output was made with."""
    import safetensors

    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "safetensors": safetensors.__version__,
    }


def hashes(weights: Weights) -> dict[str, str]:
    """BLAKE3 of each file behind `weights`, or of the tensors themselves where there is no file."""
    source = getattr(weights, "source", weights)
    if isinstance(weights, Adapted):  # the same factors with another scale are another expert
        said = json.dumps(weights.adapter.config.data, sort_keys=True, default=str)
        return hashes(source) | {"adapter_config.json as read": blake3(said.encode()).hexdigest()}
    if isinstance(source, Checkpoint):
        return source.hashes
    behind = checkpoints_behind(source)
    if behind:
        return {f"{one.label}: {file}": found for one in behind for file, found in one.hashes.items()}
    digest = blake3()
    for name in sorted(source):
        digest.update(name.encode())
        digest.update(source.read(name).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {"tensors": digest.hexdigest()}


def _content(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe decides about the bytes: all but where they go and what memory they may take."""
    out = recipe.get("out")
    kept = {k: v for k, v in out.items() if k in ("dtype", "shard")} if isinstance(out, Mapping) else {}
    return {**recipe, "out": kept}


def checkpoints_behind(node: Node) -> list[Checkpoint]:
    """The checkpoints that a computation reads, each once and whole, whichever of its tensors are read."""
    found: dict[int, Checkpoint] = {}
    seen: set[int] = set()
    waiting: list[Node] = [node]
    while waiting:
        one = waiting.pop()
        if id(one) not in seen:
            seen.add(id(one))
            waiting += one.inputs
            if isinstance(one, Checkpoint) and isinstance(whole := one.uncut, Checkpoint):
                found[id(whole)] = whole
    return sorted(found.values(), key=lambda c: c.label)


def check_resume(resume: bool, recipe: Mapping[str, Any] | None) -> None:
    """Refuses to go on from a stopped run where no recipe tells which one.

    >>> check_resume(True, None)
    Traceback (most recent call last):
    calmerge._errors.UsageError: resume needs the recipe: nothing else tells whether a stopped run made the same merge.
    """
    if resume and recipe is None:
        raise UsageError("resume needs the recipe: nothing else tells whether a stopped run made the same merge.")


def key_of(tvs: TaskVectors, recipe: Mapping[str, Any], weights: Weights, shard: str | int = "5GB") -> dict[str, str]:
    """All that the bytes depend on, by what a message calls it."""
    return {
        "recipe": digest(_content(recipe)),
        "base": tvs.base.fingerprint,
        **{f"expert '{task}'": expert.fingerprint for task, expert in tvs.experts.items()},
        "dtype": digest([spec.dtype for spec in weights.specs.values()]),
        "shard size": str(bytes_of(shard)),
        "version of calmerge or torch": digest([own_version(), versions()]),
    }


def _write_head(folder: Path, tvs: TaskVectors, task: str, head: Weights) -> dict[str, str]:
    """One task's own tensors and configuration; the hashes of these files."""
    place = folder / "heads" / task
    place.mkdir(parents=True, exist_ok=True)
    source = getattr(tvs.experts[task], "source", tvs.experts[task])
    apart = isinstance(source, Checkpoint) and any(f.name == "head.safetensors" for f in source.files)
    write_json(place / "names.json", {"names": own_names(tvs, task), "head_in_a_file_of_its_own": apart})
    config = source.folder / "config.json" if source.folder else None
    if config is not None and config.is_file():
        (place / "config.json").write_bytes(config.read_bytes())
    if len(head):
        tensors = {name: w.contiguous() for name, w in head.items()}
        save_file(tensors, place / "head.safetensors", metadata={"format": "pt"})
    return {str(f.relative_to(folder)): hash_of(f) for f in sorted(place.iterdir())}


def check_apart(path: Path, tvs: TaskVectors) -> None:
    """The output is no input, and lies in none."""
    path = path.resolve()
    for label, weights in {"the base": tvs.base, **{f"expert '{t}'": w for t, w in tvs.experts.items()}}.items():
        source = getattr(weights, "source", weights)
        behind: list[Weights] = [*checkpoints_behind(source)]
        for one in behind or [source]:
            files = [f.resolve() for f in one.files] if isinstance(one, Checkpoint) else []
            folder = one.folder.resolve() if one.folder else None
            if path == folder or path in files or path in [f.parent for f in files]:
                raise OutputError(f"the output would overwrite {label}; name another folder.")
            if folder is not None and folder in path.parents:
                raise OutputError(f"the output would lie inside {label} ({folder}); name a folder outside of it.")


def own_version() -> str:
    """That of calmerge."""
    from importlib.metadata import version

    return version("calmerge")
