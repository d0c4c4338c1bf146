"""LoRA adapters (PEFT folders) as experts: delta = s B A, computed for the rows that are asked for."""

import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from calmerge._adapter_config import CONFIG, AdapterConfig, parse_config
from calmerge._align import aligned_names
from calmerge._checkpoint import open_checkpoint
from calmerge._errors import CheckpointError, did_you_mean
from calmerge._weights import ALL, Memo, Spec, StateDict, Weights, digest

T = TypeVar("T")
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_PARTS = {"c_attn", "c_proj", "c_fc", "q_attn"}
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<leaf>weight|bias))?"
)
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.default|modules_to_save)(?=\.)")


@dataclass(frozen=True)
class Update:
    """Where the factors of one tensor's update lie: scale * left @ right, in the shape of the tensor.

    Args:
        module: the path of the adapted module.
        down: name of A.
        up: name of B.
        scale: s.
        turned: whether the tensor is stored [in, out] (embeddings, GPT-2's Conv1D): left is A^T then, right is B^T.
        magnitude: name of DoRA's magnitudes, one for each output.
    """

    module: str
    down: str
    up: str
    scale: float
    turned: bool = False
    magnitude: str | None = None


class Factors(NamedTuple):
    """A change as a product, scale * left @ right: left [rows, r], right [r, columns] of the flattened tensor."""

    left: Tensor
    right: Tensor
    scale: float

    @property
    def scaled(self) -> Tensor:
        """left, with the scale in it."""
        return self.left * self.scale


class Adapter(Weights):
    """What a LoRA adapter holds, under the names of its file; `adapted` puts it on a base.

    Args:
        tensors: factors, and full tensors of `modules_to_save` and trained biases, as PEFT names them.
        config: what `adapter_config.json` says.

    Attributes:
        updates: the factors, by the name of the tensor that they change.
        full: by the name of the tensor that they replace, full tensors.
        shifts: by the name of the bias that they change, a vector and its scale (`lora_bias`).

    Raises:
        CheckpointError: a kind that cannot be merged, factors that lack their partner or have another rank than the
            configuration says.

    >>> factors = {"q.lora_A.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.weight": torch.tensor([[1.0], [3.0]])}
    >>> cars = Adapter(factors, {"r": 1, "lora_alpha": 2})
    >>> adapted({"q.weight": torch.zeros(2, 2)}, cars)["q.weight"]
    tensor([[ 2.,  4.],
            [ 6., 12.]])
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | AdapterConfig) -> None:
        self.config = config if isinstance(config, AdapterConfig) else parse_config(config, "in memory")
        self.source = tensors if isinstance(tensors, Weights) else StateDict(tensors)
        self.inputs = (self.source,)
        self.specs, self.elementwise = self.source.specs, self.source.elementwise
        self.updates, self.full, self.shifts = _sorted_out(self.source, self.config)

    @property
    def fingerprint(self) -> str:
        """That of the file, and the configuration's."""
        return f"{self.source.fingerprint}:{digest(json.dumps(self.config.data, sort_keys=True, default=str))}"

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """One tensor of the file."""
        return self.source.read(name, rows, memo)


class Adapted(Weights):
    """A base with an adapter on it, computed block by block; see `adapted`.

    Attributes:
        base: what the adapter was put on.
        adapter: what was put on it.
        source: the adapter's tensors.
        targets: by name in the base, what the adapter calls the tensors that it changes.
        changed: names of the base's tensors that the adapter changes.
    """

    def __init__(self, base: Weights, adapter: Adapter, names: Mapping[str, str], dtype: torch.dtype | None) -> None:
        self.base, self.adapter, self.source, self.targets = base, adapter, adapter.source, dict(names)
        self.inputs = (base, adapter.source)
        self.elementwise = base.elementwise and adapter.elementwise
        self._updates = {n: _turned(u, n, base, adapter) for n, u in _under(adapter.updates, names).items()}
        self._full = _under(adapter.full, names)
        self._shifts = _under(adapter.shifts, names)
        self.changed = {n for n in (*self._updates, *self._full, *self._shifts) if n in base.specs}
        self.specs = dict(base.specs)
        for name, own in self._full.items():
            spec = self.source.specs[own]
            self.specs[name] = Spec(spec.shape, base.specs[name].dtype) if name in base.specs else spec
        if dtype is not None:
            self.specs |= {n: Spec(self.specs[n].shape, dtype) for n in self.changed}
        self._factors = lru_cache(maxsize=4)(self._load_factors)  # a few, so that no adapter is held whole
        self._gains: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """That of the base, and that of the adapter."""
        return f"{self.base.fingerprint}+{self.adapter.fingerprint}"

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The adapted tensor in its type, or some of its rows."""
        dtype = self.specs[name].dtype
        full = self._full.get(name)
        if full is not None and name not in self._updates and name not in self._shifts:
            return self.source.read(full, rows, memo).to(dtype)
        if name not in self.changed:
            return self.base.read(name, rows, memo)
        start = self.base.read(name, rows, memo).float()
        return (start + self.change(name, rows, start)).to(dtype)

    def change(self, name: str, rows: slice, start: Tensor) -> Tensor:
        """What the adapter adds to some rows of a tensor, in float32: s B A, or full tensor (or DoRA's) minus base.

        Args:
            name: one of the base's tensors.
            rows: which rows; the result has the same bits whatever rows it is asked for with.
            start: these rows of the base, in float32.
        """
        result: Tensor | None = None
        if name in self._full:
            result = self.source.read(self._full[name], rows).float() - start
        if name in self._shifts:
            vector, scale = self._shifts[name]
            shift = self.source.read(vector, rows).float() * scale
            result = shift if result is None else result + shift
        update = self._updates.get(name)
        if update is None:
            return torch.zeros_like(start) if result is None else result
        left, right = self._factors(name)
        step = product(left, right, rows).mul_(update.scale).reshape(start.shape)
        step = step if result is None else step + result
        if update.magnitude is None:
            return step
        gain = self._gain(name)
        gain = gain if update.turned else gain[rows].reshape(-1, *[1] * (start.dim() - 1))
        return gain * (start + step) - start

    def rank(self, name: str, *, copies: bool = False) -> int | None:
        """The rank of a tensor's change, 0 where there is none; None where the change is no product of two factors.

        Args:
            name: one of the base's tensors.
            copies: a full tensor beside factors is taken for PEFT's copy of the base's own, which headers do not tell.
        """
        if name not in self.changed:
            return 0
        update = self._updates.get(name)
        if update is None or update.magnitude is not None or (name in self._full and not copies):
            return None
        return self.source.specs[update.down].shape[0]

    def factors(self, name: str) -> Factors:
        """The change of a tensor that has a rank, as a product.

        >>> factors = {"q.lora_A.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.weight": torch.tensor([[1.0], [3.0]])}
        >>> on_zero = adapted({"q.weight": torch.zeros(2, 2)}, Adapter(factors, {"r": 1, "lora_alpha": 2}))
        >>> on_zero.factors("q.weight")
        Factors(left=tensor([[1.], [3.]]), right=tensor([[1., 2.]]), scale=2.0)
        """
        assert self.rank(name, copies=True) is not None
        if name not in self.changed:
            shape = self.specs[name].shape
            rows, columns = shape[0], torch.Size(shape[1:]).numel()
            return Factors(torch.zeros(rows, 0), torch.zeros(0, columns), 1.0)
        return Factors(*self._factors(name), self._updates[name].scale)

    def stored(self, names: Iterable[str]) -> list[str]:
        """What is read of the adapter's own tensors for these of the base."""
        parts: list[str | None] = []
        for name in names:
            update = self._updates.get(name)
            parts += [self._full.get(name), self._shifts.get(name, (None, 0))[0]]
            parts += [update.down, update.up, update.magnitude] if update else []
        return [part for part in parts if part is not None]

    def brings(self, name: str) -> bool:
        """Whether the adapter holds a tensor whole, beside factors or without."""
        return name in self._full

    def update(self, name: str) -> Update | None:
        """How the adapter changes a tensor, if by factors."""
        return self._updates.get(name)

    def _load_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """left [rows, r] and right [r, columns] of one tensor, in float32."""
        update = self._updates[name]
        down, up = self.source.read(update.down).float().flatten(1), self.source.read(update.up).float().flatten(1)
        left, right = (down.T, up.T) if update.turned else (up, down)
        # copies lie at aligned addresses wherever the file had them: products must not depend on that
        return left.clone(memory_format=torch.contiguous_format), right.clone(memory_format=torch.contiguous_format)

    def _gain(self, name: str) -> Tensor:
        """DoRA's g / ||W_0 + s B A||, one for each output; found once by reading the base's tensor."""
        with self._lock:
            if name not in self._gains:
                update = self._updates[name]
                assert update.magnitude is not None
                left, right = self._factors(name)
                norms = _norms(self.base, name, left, right, update)
                gain = self.source.read(update.magnitude).double().flatten() / norms
                self._gains[name] = gain.float()
            return self._gains[name]


def adapted(base: Any, adapter: "Adapter | str | Path", *, dtype: torch.dtype | None = None) -> Adapted:
    """The base with a LoRA adapter on it, lazily: W_0 + s B A, DoRA's g (W_0 + s B A) / ||W_0 + s B A||, full tensors.

    Nothing is copied: the result reads rows of the base and adds rows of B times A. It is a model like any other, so a
    second adapter may be put on it.

    Args:
        base: what the adapter was trained on; anything that `open_checkpoint` takes.
        adapter: a PEFT folder, or what `open_checkpoint` made of one.
        dtype: type of the changed tensors; the base's own when None, as when an adapter is merged by PEFT.

    Raises:
        CheckpointError: the adapter changes modules that the base lacks or that have another shape, the base is
            quantised, or it ties a tensor that the adapter changes on its own.

    >>> factors = {"q.lora_A.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.weight": torch.tensor([[1.0], [3.0]])}
    >>> base = {"q.weight": torch.ones(2, 2), "norm": torch.ones(1)}
    >>> dict(adapted(base, Adapter(factors, {"r": 1, "lora_alpha": 1})))
    {'q.weight': tensor([[2., 3.], [4., 7.]]), 'norm': tensor([1.])}
    """
    on = open_checkpoint(base)
    what = adapter if isinstance(adapter, Adapter) else open_checkpoint(adapter)
    if isinstance(on, Adapter):
        raise CheckpointError(f"the base is an adapter ('{on.config.label}'); give the full model it was trained on.")
    if not isinstance(what, Adapter):
        raise CheckpointError(
            f"'{adapter}' is no adapter: expected a folder with {CONFIG} and adapter_model.safetensors."
        )
    targets = list(dict.fromkeys([*what.updates, *what.shifts, *what.full]))
    if what.config.data.get("ensure_weight_tying") and tied(on) and "lm_head.weight" in what.full:
        targets.remove("lm_head.weight")  # a copy of the input embeddings, with which the base stores it
    names = aligned_names(targets, on.specs)
    for name, own in names.items():
        if own in what.updates or own in what.shifts:
            _check_target(name, own, on, what)
    return Adapted(on, what, names, dtype)


def product(left: Tensor, right: Tensor, rows: slice = ALL) -> Tensor:
    """Rows of left @ right, with the same bits whatever rows they are asked for with.

    A product of other shape may be rounded in another order, so it is always made in the same blocks of rows.

    >>> a, b = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0, 10.0]])
    >>> product(a, b, slice(1, 3))
    tensor([[ 2., 20.],
            [ 3., 30.]])
    """
    start, stop, _ = rows.indices(len(left))
    block = max(1, 2**16 // max(1, right.shape[1]))
    first = start // block * block
    last = min(-(-stop // block) * block, len(left))
    result = left.new_empty(max(0, last - first), right.shape[1])
    for i in range(first, last, block):
        torch.mm(left[i : i + block], right, out=result[i - first : i - first + block])
    return result[start - first : stop - first]


def _under(parts: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Parts of an adapter, under the base's names."""
    return {new: parts[old] for new, old in names.items() if old in parts}


def _turned(update: Update, name: str, base: Weights, adapter: Adapter) -> Update:
    """The update with its orientation as the base stores the tensor; only square ones believe the configuration.

    PEFT decides by the module's class, and `fan_in_fan_out` keeps what it found for the last module.
    """
    if "lora_embedding_A" in update.down or len(base.specs[name].shape) != 2:
        return update
    down, up = adapter.source.specs[update.down].shape, adapter.source.specs[update.up].shape
    if up[0] != down[1]:
        return replace(update, turned=base.specs[name].shape == (down[1], up[0]))
    return replace(update, turned=update.turned or stored_in_out(base, update.module))


def stored_in_out(base: Weights, module: str) -> bool:
    """Whether a base keeps the weights of a module as [in, out], as GPT-2's Conv1D does, by what its folder says."""
    return config_of(base).get("model_type") in _CONV1D and module.rpartition(".")[2] in _CONV1D_PARTS


def config_of(base: Weights) -> dict[str, Any]:
    """What `config.json` beside a checkpoint says; empty where there is none."""
    source = getattr(base, "source", base)
    folder = getattr(source, "folder", None)
    try:
        said = json.loads((folder / "config.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def tied(base: Weights) -> bool:
    """Whether input embeddings and output layer are one tensor, stored once, as the base's configuration says."""
    return bool(config_of(base).get("tie_word_embeddings")) and not any(
        n.endswith("lm_head.weight") for n in base.specs
    )


def _norms(base: Weights, name: str, left: Tensor, right: Tensor, update: Update) -> Tensor:
    """||W_0 + s left right|| for each output, in float64, over the inputs."""
    shape = base.specs[name].shape
    squares = torch.zeros(shape[1] if update.turned else shape[0], dtype=torch.float64)
    step = max(1, 2**18 // max(1, right.shape[1]))
    for i in range(0, shape[0], step):
        rows = slice(i, min(i + step, shape[0]))
        block = base.read(name, rows).float().flatten(1) + product(left, right, rows) * update.scale
        if update.turned:
            squares += block.double().square().sum(0)
        else:
            squares[rows] = block.double().square().sum(1)
    return squares.sqrt()


def _sorted_out(
    tensors: Weights, config: AdapterConfig
) -> tuple[dict[str, Update], dict[str, str], dict[str, tuple[str, float]]]:
    """Factors, full tensors and shifts of biases, by the name of what they change."""
    label = config.label
    parts: dict[str, dict[str, str]] = {}
    full: dict[str, str] = {}
    shifts: dict[str, tuple[str, float]] = {}
    for name in tensors:
        path = name.removeprefix("base_model.model.")
        factor = _FACTOR.fullmatch(path)
        if factor and factor["leaf"] == "bias":
            module = factor["module"]
            shifts[f"{module}.bias"] = (name, config.scale_of(module))
        elif factor:
            parts.setdefault(factor["module"], {})[factor["part"]] = name
        elif ".original_module." in path:
            continue  # PEFT's copy of the base's own tensor
        elif ".lora_" in path or ".token_adapter." in path:
            raise CheckpointError(
                f"adapter '{label}': tensor '{name}' is part of a LoRA variant that is not read. "
                "Merge it into its base with PEFT's merge_and_unload, and give the result."
            )
        else:
            full[_WRAPPED.sub("", path)] = name
    updates = {f"{m}.weight": _update(m, found, tensors.specs, config) for m, found in parts.items()}
    if not updates and not full and not shifts:
        raise CheckpointError(f"adapter '{label}' holds no tensor.")
    return updates, full, shifts


def _update(module: str, found: Mapping[str, str], specs: Mapping[str, Spec], config: AdapterConfig) -> Update:
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    kind = "lora_embedding_" if embedding else "lora_"
    where = f"adapter '{config.label}': module '{module}'"
    for part in (f"{kind}A", f"{kind}B"):
        if part not in found:
            raise CheckpointError(f"{where} lacks its {part}. Save the adapter again.")
    down, up = found[f"{kind}A"], found[f"{kind}B"]
    ranks = (specs[down].shape[0], specs[up].shape[1] if len(specs[up].shape) > 1 else -1)
    expected = config.rank_of(module)
    if ranks != (expected, expected):
        raise CheckpointError(
            f"{where} has rank {ranks[0]} in A and {ranks[1]} in B, and {CONFIG} says {expected}, so that its scale is "
            "unknown. Use the configuration that was saved with it."
        )
    magnitude = found.get("lora_magnitude_vector")
    if config.dora != (magnitude is not None):
        said, held = ("yes", "no") if config.dora else ("no", "yes")
        raise CheckpointError(f"{where}: {CONFIG} says DoRA: {said}, its file holds magnitudes: {held}.")
    turned = embedding or (config.fan_in_fan_out and len(specs[down].shape) == 2)
    return Update(module, down, up, config.scale_of(module), turned=turned, magnitude=magnitude)


def _check_target(name: str, own: str, base: Weights, adapter: Adapter) -> None:
    """Whether the base has what an update changes, in its shape and as floating numbers."""
    where = f"adapter '{adapter.config.label}' changes '{own}'"
    if name not in base.specs:
        if name.endswith(("lm_head.weight", "embed_out.weight")) and tied(base):
            raise CheckpointError(
                f"{where}, which the base ties to its input embeddings and does not store: merging would change both. "
                "Untie and save the base first."
            )
        raise CheckpointError(
            f"{where}, which the base lacks. {did_you_mean(name, base.specs)} Use the base that it was trained on."
        )
    spec = base.specs[name]
    if not spec.dtype.is_floating_point:
        raise CheckpointError(
            f"{where}, which the base stores as {spec.dtype}: it is quantised. Use the floating-point original."
        )
    update = adapter.updates.get(own)
    if update is None:
        found: tuple[int, ...] = adapter.source.specs[adapter.shifts[own][0]].shape
    else:
        down, up = adapter.source.specs[update.down].shape, adapter.source.specs[update.up].shape
        found = (up[0], *down[1:])
        if "lora_embedding_A" in update.down or (len(down) == 2 and spec.shape == (down[1], up[0])):
            found = (down[1], up[0])
    full = adapter.full.get(own)
    shape = spec.shape if full is None else adapter.source.specs[full].shape
    if found != shape or shape != spec.shape:
        raise CheckpointError(
            f"{where} by a tensor of shape {found if found != shape else shape}, base has {spec.shape}. "
            "Use the base that it was trained on (a resized vocabulary and grouped convolutions differ so)."
        )
    together = adapter.config.data.get("ensure_weight_tying")
    if update is not None and tied(base) and "lora_embedding_A" in update.down and not together:
        raise CheckpointError(
            f"{where}, which the base ties to its output layer: as one tensor both would change, and the adapter was "
            "trained with the output layer left alone. Untie and save the base first."
        )
