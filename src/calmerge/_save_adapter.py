"""A merge written as a LoRA adapter that PEFT loads, with the error of every module."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmerge._adapter_config import CONFIG, adapter_options
from calmerge._checkpoint import Checkpoint, Source
from calmerge._errors import CheckpointError, OutputError, UsageError
from calmerge._folder import resumable_folder
from calmerge._hash import ALGORITHM, hash_of
from calmerge._lora import Adapted, adapted, config_of, stored_in_out, tied
from calmerge._measure import ahead, workers
from calmerge._products import Products
from calmerge._run import Run
from calmerge._save import check_apart, check_resume, input_hashes, key_of, provenance
from calmerge._signature import Count, KeepFraction, check, raise_together
from calmerge._task_vectors import TaskVectors, task_vectors
from calmerge._weights import Weights, add, blocks, digest
from calmerge._writer import MANIFEST, settle_kept, write_json
from calmerge.pieces.factorise import Product, factorise

Kind = Literal["linear", "embedding", "full", "left out"]
_EMBEDDINGS = {"wte", "wpe", "shared"}


@dataclass(frozen=True)
class Written:
    """What became of one tensor of a merge in an adapter.

    Args:
        name: in the base.
        kind: "linear" or "embedding" (by factors), "full" (as it is), or "left out".
        rank: of the factors.
        norm: of the change.
        error: of the factors as they are stored, as a share of `norm`; 0 of full tensors, 1 of what is left out.
        energy: squared singular values kept, as a share of all.
        why: of what is left out, the reason.
    """

    name: str
    kind: Kind
    rank: int | None
    norm: float
    error: float
    energy: float
    why: str = ""


def save_adapter(
    path: str | Path,
    tvs: TaskVectors,
    delta: Weights,
    *,
    rank: Count | None = None,
    energy: KeepFraction | None = None,
    full: bool = True,
    dtype: torch.dtype = torch.float32,
    recipe: Mapping[str, Any] | None = None,
    resume: bool = False,
    also: Callable[[Path], None] | None = None,
    threads: int | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """The manifest of the PEFT folder written: a merge as an adapter over its base, every change as B A with scale 1.

    Without `rank` and `energy` it is exact: a linear merge of adapters has no more rank than theirs together. Matrices
    become factors (U sqrt(S) and sqrt(S) V^T of their singular triples), other parameters of modules full tensors
    (`modules_to_save`, biases); nothing is dropped without standing in the manifest. The folder is read again before it
    is in its place, and must give the factors back.

    Holds the adapter, and for each thread a few copies of one tensor.

    Args:
        path: a folder that does not exist yet, or is empty.
        tvs: the task vectors that were merged.
        delta: what came out, lazy or not.
        rank: most singular values kept of a module. All modules get this rank then, filled with zeros where there is
            less, as some engines want it.
        energy: share of the squared singular values kept of each module, in (0, 1].
        full: whether changed norms, biases and the like are kept as full tensors; left out if not.
        dtype: of factors and full tensors.
        recipe: what made `delta`, for the manifest; without it nothing is kept of a run that is stopped.
        resume: go on from the factors that a stopped run with the same recipe, inputs and options had found.
        also: called with the folder before it is whole, to write more files into it.
        threads: tensors worked on at a time; as many as there are cores when None.
        run: progress in entries.

    Raises:
        UsageError: an exact adapter was asked for and a module has too much rank for one; `resume` without a recipe.
        OutputError: the place is taken, is an input's, or cannot be written; or what a stopped run left is of another
            merge.
        CheckpointError: an input has entries that are NaN or infinite.

    >>> import tempfile
    >>> from calmerge import average
    >>> base, a = {"q.weight": torch.zeros(3, 3)}, {"q.weight": torch.diag(torch.tensor([4.0, 0.0, 3.0]))}
    >>> tvs = task_vectors(base, {"a": a})
    >>> with tempfile.TemporaryDirectory() as place:
    ...     manifest = save_adapter(Path(place) / "out", tvs, average(tvs), rank=1)
    ...     adapted(base, Path(place) / "out")["q.weight"].round()
    tensor([[4., 0., 0.],
            [0., 0., 0.],
            [0., 0., 0.]])
    >>> [(row["name"], row["rank"], round(row["error"], 4)) for row in manifest["modules"]]
    [('q.weight', 1, 0.6)]
    """
    raise_together(check(adapter_options, {"rank": rank, "energy": energy, "full": full}, name="adapter"))
    path, run, threads = Path(path), run or Run(), threads or os.cpu_count() or 1
    check_resume(resume, recipe)
    check_apart(path, tvs)
    pad = rank if energy is None else None
    need = largest(tvs, rank=rank, energy=energy, full=full, dtype=dtype) if rank else 0
    options = {"options of the adapter": digest((rank, energy, full, dtype))}
    key = None if recipe is None else key_of(tvs, recipe, delta) | options
    with resumable_folder(path, need=need if key is None else 2 * need, key=key, resume=resume) as (folder, journal):
        kept = None if key is None else Products(folder / "factors", journal)
        make = _Maker(tvs, delta, rank=rank, energy=energy, full=full, pad=pad, dtype=dtype, kept=kept)
        settle_kept([delta], threads, run, journal)
        with run.progress.track("factorising", delta.numel, "entry") as bar, workers(threads) as pool:
            for names in make.in_order():
                for size in ahead(pool, make, names, 2 * threads):
                    bar.advance(size)
        make.add_heads()
        make.complete()
        if not make.tensors:
            raise CheckpointError("nothing to write: the merge changes no tensor that an adapter can hold.")
        config = make.config()
        save_file(dict(sorted(make.tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / CONFIG, config)
        make.verify(folder)
        if kept:
            kept.clear()
        rows = [make.rows[n] for n in [*delta, *(n for n in make.rows if n not in delta)] if n in make.rows]
        manifest = provenance(tvs, recipe, input_hashes(tvs), len(delta)) | {
            "modules": [asdict(row) for row in rows],
            "hash": ALGORITHM,
            "files": {file: hash_of(folder / file) for file in ("adapter_model.safetensors", CONFIG)},
        }
        write_json(folder / MANIFEST, manifest)
        if also is not None:
            also(folder)
    return manifest


def extract_lora(
    base: Source,
    expert: Source,
    path: str | Path,
    *,
    rank: Count | None = None,
    energy: KeepFraction | None = None,
    full: bool = True,
    exclude: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    resume: bool = False,
    run: Run | None = None,
) -> dict[str, Any]:
    """The manifest of the PEFT folder written: what an expert adds to its base, as a LoRA adapter.

    Args:
        base: what the expert was fine-tuned from.
        expert: a full model, or an adapter whose rank is to change.
        path: a folder that does not exist yet, or is empty.
        rank, energy, full, dtype, resume, run: as in `save_adapter`.
        exclude: shell patterns of tensors that stay the base's.

    >>> import tempfile
    >>> base, expert = {"q.weight": torch.zeros(2, 2)}, {"q.weight": torch.tensor([[1.0, 2.0], [2.0, 4.0]])}
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = extract_lora(base, expert, Path(place) / "out", rank=1)
    ...     adapted(base, Path(place) / "out")["q.weight"].round()
    tensor([[1., 2.],
            [2., 4.]])
    """
    tvs = task_vectors(base, {"expert": expert}, exclude=exclude)
    recipe = {"extract_lora": {"rank": rank, "energy": energy, "full": full, "exclude": list(exclude)}}
    return save_adapter(
        path, tvs, tvs.of("expert"), rank=rank, energy=energy, full=full, dtype=dtype, recipe=recipe, resume=resume,
        run=run,
    )  # fmt: skip


def largest(
    tvs: TaskVectors,
    *,
    rank: int | None = None,
    energy: float | None = None,
    full: bool = True,
    dtype: torch.dtype = torch.float32,
) -> int:
    """The most bytes that an adapter of these task vectors takes; of an exact one, if the merge is linear."""
    entries = 0
    for name, spec in tvs.specs.items():
        if name.endswith(".weight") and len(spec.shape) > 1:
            m, n = spec.shape[0], torch.Size(spec.shape[1:]).numel()
            ranks = tvs.ranks(name)
            most = min(m, n) if ranks is None else min(m, n, sum(ranks))
            entries += (rank if rank and energy is None else min(most, rank or most)) * (m + n)
        else:
            entries += spec.numel if full else 0
    return entries * dtype.itemsize


class _Maker:
    """Collects tensors and rows of an adapter; called with one name after the other, from several threads."""

    def __init__(
        self, tvs: TaskVectors, delta: Weights, *, rank: int | None, energy: float | None, full: bool, pad: int | None,
        dtype: torch.dtype, kept: Products | None,
    ) -> None:  # fmt: skip
        self._kept = kept
        self._tvs, self._delta, self._whole = tvs, delta, add(tvs.base, delta)
        self._rank, self._energy, self._full, self._pad, self._dtype = rank, energy, full, pad, dtype
        self._adapters = [w for w in tvs.experts.values() if isinstance(w, Adapted)]
        self._tied = _tied_tables(tvs.base)
        self.tensors: dict[str, Tensor] = {}
        self.rows: dict[str, Written] = {}
        self._ranks: dict[str, int] = {}
        self._saved: set[str] = set()
        self._biases = False
        self._turned = False

    def in_order(self) -> tuple[list[str], list[str]]:
        """All names: factors first, as the biases beside them are stored otherwise than those of other modules."""
        low = dict.fromkeys(n for n in self._delta if self._kind(n) in ("linear", "embedding"))
        return [*low], [n for n in self._delta if n not in low]

    def __call__(self, name: str) -> int:
        """Make what an adapter holds of one tensor; how many entries that was."""
        kind = self._kind(name)
        one = self._delta.only_names([name])  # by rows where that can be, as T task vectors take T times the memory
        parts = [one.read(name, rows) for _, rows in blocks(one)]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if kind in ("linear", "embedding"):
            self._factors(name, kind, tensor)
        elif tensor.any():
            self._keep(name, kind, self._whole.read(name), float(torch.linalg.vector_norm(tensor.double())))
        return tensor.numel()

    def add_heads(self) -> None:
        """Keep the tensors that an only expert has for itself; of several there is no one to keep."""
        for task, head in self._tvs.heads.items():
            for name in head:
                if len(self._tvs.tasks) == 1:
                    value = head.read(name)
                    self._keep(name, self._kind(name, head=True), value, float(value.double().norm()))
                else:
                    self.rows[f"{task}: {name}"] = Written(name, "left out", None, 0.0, 1.0, 0.0, f"head of '{task}'")

    def complete(self) -> None:
        """Whole modules where PEFT replaces them; those of which the bias alone has changed are kept as biases."""
        for name in self._tvs.base.specs:
            module, full = self._module(name), self._full_name(name)
            if module not in self._saved or full in self.tensors:
                continue
            if name.endswith(".weight"):
                self._saved.remove(module)
                self._biases = True
            elif name.endswith(".bias"):
                self.tensors[full] = self._whole.read(name).to(self._dtype).clone()

    def config(self) -> dict[str, Any]:
        """`adapter_config.json`: that of the first adapter where there is one, with ranks and scales of our own."""
        first = self._adapters[0].adapter.config.data if self._adapters else {}
        common = self._pad or Counter(self._ranks.values()).most_common(1)[0][0] if self._ranks else 8
        pattern = {module: rank for module, rank in sorted(self._ranks.items()) if rank != common}
        source = getattr(self._tvs.base, "source", self._tvs.base)
        base = source.label if isinstance(source, Checkpoint) else None
        return {
            "peft_type": "LORA",
            "task_type": first.get("task_type"),
            "base_model_name_or_path": first.get("base_model_name_or_path") or base,
            "r": common,
            "lora_alpha": common,
            "lora_dropout": 0.0,
            "bias": "all" if self._biases else "none",
            "target_modules": _short(self._ranks, self._modules()),
            "modules_to_save": sorted(self._saved) or None,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "fan_in_fan_out": self._turned,
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "inference_mode": True,
            **({"ensure_weight_tying": True} if "lm_head" in self._saved else {}),
        }

    def verify(self, folder: Path) -> None:
        """Read the folder as an expert, and compare with what was to be written, bit for bit.

        Raises:
            OutputError: it reads as something else.
        """
        again = adapted(self._tvs.base, folder, dtype=self._dtype)
        for name, row in self.rows.items():
            if row.kind in ("linear", "embedding"):
                left, right, scale = again.factors(name)
                a, b = self._of(name, row.kind)
                same = scale == 1 and torch.equal(left, b.float()) and torch.equal(right, a.float())
            elif row.kind == "full":
                same = torch.equal(again.read(name), self.tensors[self._full_name(name)])
            else:
                continue
            if not same:
                raise OutputError(f"what was written for '{name}' reads as something else; nothing is left of it.")

    def _kind(self, name: str, *, head: bool = False) -> Kind:
        spec = self._tvs.base.specs.get(name)
        module, _, leaf = name.rpartition(".")
        update = next((u for w in self._adapters if (u := w.update(name))), None)
        if name in self._tied:
            return "full"  # PEFT keeps full tensors tied, but not factors
        if update is not None:
            return "embedding" if "lora_embedding_A" in update.down else "linear"
        if leaf == "weight" and spec is not None and len(spec.shape) == 2 and not head:
            return "embedding" if _is_table(module) else "linear"
        return "full" if module and leaf in ("weight", "bias") else "left out"

    def _turns(self, name: str) -> bool:
        """Whether a tensor is stored [in, out]."""
        update = next((u for w in self._adapters if (u := w.update(name))), None)
        return update.turned if update else stored_in_out(self._tvs.base, name.rpartition(".")[0])

    def _factors(self, name: str, kind: Kind, tensor: Tensor) -> None:
        ranks = self._tvs.ranks(name, copies=True)
        within = self._tvs.factors(name) if ranks is not None else None  # which is tried, and left where it is not so

        def make() -> Product:
            matrix = tensor.flatten(1)
            return factorise(matrix, rank=self._rank, energy=self._energy, dtype=self._dtype, within=within)

        found = self._kept.of(name, make) if self._kept else make()
        if found.rank == 0:
            return
        m, n = found.left.shape[0], found.right.shape[1]
        linear = ranks is not None and found.rank <= sum(ranks)  # no more than the inputs take together
        if self._rank is None and self._energy is None and not linear and found.rank * (m + n) > m * n:
            if self._full and any(w.brings(name) for w in self._adapters):  # another tensor than the base's
                self._keep(name, "full", self._whole.read(name), found.norm)
                return
            raise UsageError(
                f"an exact adapter was asked for, but the change of '{name}' has rank {found.rank}: its factors would "
                f"be larger than the tensor ({m} x {n}). Say a rank or an energy, or write full weights. Methods that "
                "are not linear in the task vectors, and experts that are no adapters, have no exact one."
            )
        left, right = _padded(found, self._pad)
        turned = kind == "embedding" or self._turns(name)
        self._turned = self._turned or (turned and kind == "linear")
        a, b = (left.T, right.T) if turned else (right, left)
        if tensor.dim() > 2:
            a, b = a.reshape(-1, *tensor.shape[1:]), b.reshape(*b.shape, *[1] * (tensor.dim() - 2))
        names = self._names(name, kind)
        self.tensors |= {names[0]: a.contiguous(), names[1]: b.contiguous()}
        self._ranks[self._module(name)] = left.shape[1]
        self.rows[name] = Written(name, kind, found.rank, found.norm, found.error, found.energy)

    def _keep(self, name: str, kind: Kind, value: Tensor, norm: float) -> None:
        if kind == "left out" or not self._full:
            why = "full tensors are left out" if not self._full else "a bare parameter, which PEFT cannot save"
            self.rows[name] = Written(name, "left out", None, norm, 1.0, 0.0, why)
            return
        self.tensors[self._full_name(name)] = value.to(self._dtype).clone()
        if name in self._tied:
            self.tensors["base_model.model.lm_head.weight"] = value.to(self._dtype).clone()
            self._saved.add("lm_head")
        if self._module(name) in self._ranks:
            self._biases = True
        else:
            self._saved.add(self._module(name))
        self.rows[name] = Written(name, "full", None, norm, 0.0, 1.0)

    def _of(self, name: str, kind: Kind) -> tuple[Tensor, Tensor]:
        """What was written, as (right, left)."""
        a, b = (self.tensors[n].flatten(1) for n in self._names(name, kind))
        return (b.T, a.T) if kind == "embedding" or self._turns(name) else (a, b)

    def _names(self, name: str, kind: Kind) -> tuple[str, str]:
        start = f"base_model.model.{self._module(name)}."
        if kind == "embedding":
            return start + "lora_embedding_A", start + "lora_embedding_B"
        return start + "lora_A.weight", start + "lora_B.weight"

    def _full_name(self, name: str) -> str:
        inside = ".base_layer" if self._module(name) in self._ranks else ""
        return f"base_model.model.{self._module(name)}{inside}.{name.rpartition('.')[2]}"

    def _module(self, name: str) -> str:
        """The path of a tensor's module as the adapters' model has it, which may have one leading part more or less."""
        for one in self._adapters:
            for new, own in one.targets.items():
                if new != own:
                    name = (
                        own.removesuffix(new) + name if own.endswith(new) else name.removeprefix(new.removesuffix(own))
                    )
                    return name.rpartition(".")[0]
        return name.rpartition(".")[0]

    def _modules(self) -> set[str]:
        """All modules that have a matrix."""
        specs = self._tvs.base.specs
        return {self._module(n) for n, s in specs.items() if n.endswith(".weight") and len(s.shape) > 1}


def _tied_tables(base: Weights) -> set[str]:
    """The input embeddings of a base whose output layer is the same tensor."""
    rows = config_of(base).get("vocab_size")
    return {
        n for n, s in base.specs.items() if tied(base) and s.shape[:1] == (rows,) and _is_table(n.rpartition(".")[0])
    }


def _is_table(module: str) -> bool:
    """Whether a module is an embedding, by its name."""
    last = module.rpartition(".")[2]
    return "embed" in last or last in _EMBEDDINGS


def _padded(found: Product, rank: int | None) -> tuple[Tensor, Tensor]:
    more = max(0, (rank or 0) - found.rank)
    left, right = found.left, found.right
    return (
        torch.cat([left, left.new_zeros(len(left), more)], 1),
        torch.cat([right, right.new_zeros(more, right.shape[1])]),
    )


def _short(modules: Mapping[str, int], known: set[str]) -> list[str]:
    """The last parts of the modules' paths, where they name no other module; else the whole paths."""
    last = {module.rpartition(".")[2] for module in modules}
    named = {m for m in known if m.rpartition(".")[2] in last}
    return sorted(last) if named == set(modules) else sorted(modules)
