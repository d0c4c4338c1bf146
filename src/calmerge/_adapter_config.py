"""What `adapter_config.json` of a PEFT folder says, and whether a merge can honour it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calmerge._errors import CheckpointError
from calmerge._signature import Count, KeepFraction

CONFIG = "adapter_config.json"

_ALTERED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED = {
    "alora_invocation_tokens": "it acts after certain tokens only, which no weights can express",
    "arrow_config": "it routes between adapters while it runs",
    "kasa_config": "KaSA's diagonal factors are not read",
    "layer_replication": "it repeats layers of the base; build that base first",
    "monteclora_config": "it samples its weights while it runs",
    "target_parameters": "it adapts bare parameters rather than modules, which is not read",
    "trainable_token_indices": "single trained tokens are not read; merge them into the base first",
    "use_bdlora": "block-diagonal factors are not read",
    "use_qalora": "QA-LoRA pools the input, which a weight cannot express here",
}


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and scale of each module of a LoRA adapter.

    Args:
        label: what messages call the adapter.
        rank: r, of modules that no pattern names.
        alpha: lora_alpha, of modules that no pattern names.
        rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
        rank_pattern: r by module, as PEFT matches it: the end of a module's path, or a regular expression for one.
        alpha_pattern: alpha by module, likewise.
        fan_in_fan_out: whether the adapted weights are stored [in, out].
        dora: whether magnitudes belong to it.
        data: the whole file.
    """

    label: str
    rank: int
    alpha: float
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    dora: bool = False
    data: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank_of(self, module: str) -> int:
        """The rank of one module.

        >>> AdapterConfig("a", 8, 16, rank_pattern={"q_proj": 4}).rank_of("model.layers.0.q_proj")
        4
        """
        return int(self.rank_pattern.get(_key(self.rank_pattern, module), self.rank))

    def scale_of(self, module: str) -> float:
        """s in delta = s B A.

        >>> AdapterConfig("a", 16, 32).scale_of("q_proj"), AdapterConfig("a", 16, 8, rslora=True).scale_of("q_proj")
        (2.0, 2.0)
        """
        rank = self.rank_of(module)
        alpha = float(self.alpha_pattern.get(_key(self.alpha_pattern, module), self.alpha))
        return alpha / rank**0.5 if self.rslora else alpha / rank


def load_config(folder: Path, label: str) -> AdapterConfig:
    """The configuration in a PEFT folder.

    Raises:
        CheckpointError: it is no JSON, or of a kind that cannot be merged.
    """
    try:
        data = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{folder / CONFIG}: not a readable adapter configuration ({e}).") from None
    return parse_config(data, label)


def parse_config(data: Mapping[str, Any], label: str) -> AdapterConfig:
    """The configuration that `data` is.

    Raises:
        CheckpointError: it is of a kind whose update is no s B A over the base; the message says which, and why.

    >>> parse_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, "cars").scale_of("q_proj")
    2.0
    >>> parse_config({"peft_type": "IA3"}, "cars")
    Traceback (most recent call last):
    calmerge._errors.CheckpointError: adapter 'cars' is of type IA3; LORA (with or without DoRA) can be read. Merge it \
into its base with PEFT's merge_and_unload, and give the result.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"adapter '{label}': its configuration must be a mapping, got {type(data).__name__}.")
    kind = str(data.get("peft_type", "LORA")).rsplit(".", 1)[-1]
    whole = "Merge it into its base with PEFT's merge_and_unload, and give the result."
    if kind != "LORA":
        raise CheckpointError(f"adapter '{label}' is of type {kind}; LORA (with or without DoRA) can be read. {whole}")
    for key, why in _REFUSED.items():
        if data.get(key):
            raise CheckpointError(f"adapter '{label}' uses {key}: {why}.")
    init = str(data.get("init_lora_weights", True)).lower()
    if init.startswith(_ALTERED_BASE):
        raise CheckpointError(
            f"adapter '{label}' began as {init}, which changed its base: B A is not what it adds to the original one. "
            "Save it again with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA."
        )
    rank, alpha = data.get("r", 8), data.get("lora_alpha", 8)
    patterns = {key: data.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    numbers = [alpha, *patterns["alpha_pattern"].values()]
    ranks = [rank, *patterns["rank_pattern"].values()]
    if not all(isinstance(r, int) and r > 0 for r in ranks) or not all(isinstance(a, int | float) for a in numbers):
        raise CheckpointError(f"adapter '{label}': r and lora_alpha must be numbers, r a whole one above 0.")
    return AdapterConfig(
        label,
        rank,
        float(alpha),
        rslora=bool(data.get("use_rslora")),
        rank_pattern=patterns["rank_pattern"],
        alpha_pattern=patterns["alpha_pattern"],
        fan_in_fan_out=bool(data.get("fan_in_fan_out")),
        dora=bool(data.get("use_dora")),
        data=dict(data),
    )


def adapter_options(*, rank: Count | None = None, energy: KeepFraction | None = None, full: bool = True) -> None:
    """What `out: {adapter: ...}` of a recipe may say, in a form that `check` can read."""


def _key(pattern: Mapping[str, Any], module: str) -> str:
    """The first key of a pattern that fits a module's path."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), "")
