"""Whether checkpoints can be merged at all, and with each other: what headers and side files tell.

Every function returns sentences, so that all mistakes can be reported together.
"""

import filecmp
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from calmerge._checkpoint import Checkpoint
from calmerge._layers import Layer, layers
from calmerge._weights import Spec, Weights

COMPARED = 64_000_000  # bytes up to which two files are compared to see whether they are copies

_QUANTISED = re.compile(
    r"\.(?:qweight|qzeros|g_idx|SCB|absmax|quant_map|nested_absmax|quant_state\.\w+|weight_packed|weight_scale_inv|W_q)$"
)
_VOCABULARY = re.compile(
    r"embed_tokens|lm_head|embed_out|\bwte\b|word_embeddings|embed_in|shared\.weight|tok_embeddings"
)


def unfit(who: str, weights: Weights, *, exclude: Sequence[str] = (), base: bool = False) -> Iterator[str]:
    """Why these weights cannot be merged, whatever the others are.

    Args:
        who: `the base` or `expert 'cars'`.
        weights: opened.
        exclude: shell patterns of tensors that are not merged.
        base: whether they are the base, whose other tensors are copied.

    >>> from calmerge import StateDict
    >>> gptq = StateDict({"q.qweight": torch.zeros(2, 2, dtype=torch.int32)})
    >>> print(*unfit("expert 'a'", gptq))
    expert 'a' is quantised: it has a tensor 'q.qweight'. Use the original float16 or bfloat16 checkpoint.
    """
    foreign = {n: t for n, t in getattr(_source(weights), "foreign", {}).items() if base or not _any(n, exclude)}
    if not len(weights) and not foreign:
        yield f"{who} holds no tensor."
    names = [n for n in weights if not _any(n, exclude)]
    quantised = next((n for n in names if _is_quantised(n, weights.specs)), None)
    if quantised is not None:
        yield (
            f"{who} is quantised{_by(weights)}: it has a tensor '{quantised}'. Use the original float16 or bfloat16 "
            f"checkpoint{_original(weights)}."
        )
    if base and any(".lora_A." in n for n in names):
        yield f"{who} is an adapter{_of(weights)}; give the full model that it was trained on."
    odd = {n: weights.specs[n].dtype for n in names if weights.specs[n].dtype in _NOT_MERGED}
    if odd:
        name, dtype = next(iter(odd.items()))
        yield (
            f"{who}: {_and_more('tensor', [*odd])} of type {str(dtype).removeprefix('torch.')}, which cannot be "
            f"merged. Exclude it (exclude: ['{name}']), or use the float16 or bfloat16 original."
        )
    if foreign:
        kind = next(iter(foreign.values()))
        yield (
            f"{who}: {_and_more('tensor', [*foreign])} of type {kind}, which torch cannot read. "
            "Use the float16 or bfloat16 original."
        )


def repeats(base: Weights, experts: Mapping[str, Weights]) -> Iterator[tuple[str, str]]:
    """Experts that are the base itself, or another expert again: the task's name and a sentence.

    Files count as the same if they are one file, by links or another path, or if they hold the same bytes (up to
    `COMPARED` bytes are compared). Tensors in memory are never compared.
    """
    before: dict[str, Weights] = {}
    for task, weights in experts.items():
        if _same(weights, base):
            yield (
                task,
                (
                    f"expert '{task}' is the base itself ({_source(weights).label}): its task vector is 0. "  # type: ignore[attr-defined]
                    "Remove it, or name what was fine-tuned."
                ),
            )
        for other, known in before.items():
            if _same(weights, known):
                yield (
                    task,
                    (
                        f"expert '{task}' is expert '{other}' again ({_source(weights).label}). "  # type: ignore[attr-defined]
                        "Remove one of the two; for more influence, give it more weight."
                    ),
                )
                break
        before[task] = weights


def misfits(
    base: Weights, experts: Mapping[str, Weights], merged: Iterable[str], *, exclude: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """How experts differ from the base in the tensors `merged`: the task's name and a sentence, one for each kind."""
    merged = list(merged)
    at = layers(base)
    for task, weights in experts.items():
        who = f"expert '{task}'"
        deeper = _depths(base, weights, at)
        if deeper:
            yield task, f"{who} {deeper}"
        lacking = [n for n in merged if n not in weights.specs and not (deeper and n in at)]
        if lacking:
            yield (
                task,
                (
                    f"{who} lacks {_and_more('tensor', lacking)}, which the base and other experts have. "
                    f"Exclude {_it(lacking)}, or use a checkpoint of the same base."
                ),
            )
        shared = [n for n in merged if n in weights.specs]
        differing = [n for n in shared if weights.specs[n].shape != base.specs[n].shape]
        rows = [n for n in differing if _VOCABULARY.search(n) and _rows_only(base.specs[n], weights.specs[n])]
        if rows:
            yield task, _vocabularies(who, rows, base, weights)
        others = [n for n in differing if n not in rows]
        if others:
            name = others[0]
            yield (
                task,
                (
                    f"{who}: tensor '{name}' has shape {weights.specs[name].shape}, base has {base.specs[name].shape}"
                    f"{_likewise(others)}. Exclude {_it(others)}, or use a checkpoint of the same base."
                ),
            )
        whole = [n for n in shared if n not in differing and not weights.specs[n].dtype.is_floating_point]
        if whole:
            name = whole[0]
            yield (
                task,
                (
                    f"{who}: tensor '{name}' has type {weights.specs[name].dtype}, base has {base.specs[name].dtype}"
                    f"{_likewise(whole)}. Quantised checkpoints cannot be merged; use the floating-point original."
                ),
            )


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor of this name are tokens.

    >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("lm_head.weight"), is_vocabulary("classifier.weight")
    (True, True, False)
    """
    return "embed" in name or bool(_VOCABULARY.search(name))


def tokenizer_size(weights: Weights) -> int | None:
    """How many tokens the tokenizer beside the weights knows; None if none is there that can be counted."""
    # it only helps a message: read as far as it is sound, and never loaded by a library that may run code
    folder = getattr(_source(weights), "folder", None)
    if folder is None:
        return None
    tokens: set[str] = set()
    whole = _json(folder / "tokenizer.json")
    model = whole.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else _json(folder / "vocab.json")
    for part in (vocab, whole.get("added_tokens"), _json(folder / "added_tokens.json")):
        tokens |= {_token(entry) for entry in part} if isinstance(part, list | dict) else set()
    if not tokens and (folder / "vocab.txt").is_file():
        tokens = set((folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").splitlines())
    return len(tokens) or None


_NOT_MERGED = {torch.complex64, torch.complex128, torch.float8_e8m0fnu}


def _token(entry: object) -> str:
    """The text of a token as vocabularies write them: alone, with its score, or as one of several properties."""
    if isinstance(entry, list) and entry:
        return str(entry[0])
    return str(entry.get("content")) if isinstance(entry, dict) else str(entry)


def _is_quantised(name: str, specs: Mapping[str, Spec]) -> bool:
    if _QUANTISED.search(name):
        return True
    if name.endswith((".weight_scale", "_scales")):  # of 8-bit weights, or of packed blocks of 4-bit ones
        packed = name.removesuffix("_scale") if name.endswith("_scale") else name.removesuffix("_scales") + "_blocks"
        return packed in specs and specs[packed].dtype.itemsize == 1
    spec = specs[name]
    return name.endswith(".weight") and len(spec.shape) == 2 and spec.dtype in {torch.int8, torch.uint8, torch.int32}


def _depths(base: Weights, expert: Weights, at: Mapping[str, Layer]) -> str:
    """A sentence if one model has layers that the other lacks."""
    theirs = layers(expert)
    counts = {stack: (layer.count, 0) for layer in at.values() for stack in [layer.stack]}
    for layer in theirs.values():
        if layer.stack in counts:
            counts[layer.stack] = counts[layer.stack][0], layer.count
    for stack, (ours, found) in counts.items():
        if found and found != ours and _alike(base, expert, stack):
            return (
                f"has {found} layers in '{stack}', base has {ours}. Models of different depth cannot be merged; use a "
                "checkpoint of the same base."
            )
    return ""


def _alike(base: Weights, expert: Weights, stack: str) -> bool:
    """Whether the first layers have the same tensors in both."""
    first = f"{stack}.0."
    a, b = ({n: w.specs[n].shape for n in w if n.startswith(first)} for w in (base, expert))
    return a == b


def _vocabularies(who: str, rows: list[str], base: Weights, expert: Weights) -> str:
    name = rows[0]
    theirs, ours = expert.specs[name].shape[0], base.specs[name].shape[0]
    sizes = [f"{w} {n} tokens" for w, n in ((who, tokenizer_size(expert)), ("base", tokenizer_size(base))) if n]
    known = f" (tokenizers: {', '.join(sizes)})" if sizes else ""
    patterns = ", ".join(f"'{n}'" for n in rows[:3])
    return (
        f"{who}: '{name}' has {theirs} rows, base has {ours}: their vocabularies differ{known}{_likewise(rows)}. "
        f"Keep the base's with exclude: [{patterns}], or merge with a mergekit configuration that says how tokens are "
        "matched (tokenizer: {source: union})."
    )


def _rows_only(a: Spec, b: Spec) -> bool:
    return len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1]


def _same(a: Weights, b: Weights) -> bool:
    ours, theirs = _source(a), _source(b)
    if not isinstance(ours, Checkpoint) or not isinstance(theirs, Checkpoint):
        return False
    if len(ours.files) != len(theirs.files):
        return False
    pairs = list(zip(ours.files, theirs.files, strict=True))
    try:
        if all(f.samefile(g) for f, g in pairs):
            return True
        sizes = [(f.stat().st_size, g.stat().st_size) for f, g in pairs]
        if any(f != g for f, g in sizes) or sum(f for f, _ in sizes) > COMPARED:
            return False
        return all(filecmp.cmp(f, g, shallow=False) for f, g in pairs)
    except OSError:  # gone since it was opened; reading says so
        return False


def _source(weights: Weights) -> Weights:
    source: Weights = getattr(weights, "source", weights)
    return source


def _by(weights: Weights) -> str:
    found = _config(weights).get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    return f" ({method}, says its config.json)" if isinstance(method, str) else ""


def _original(weights: Weights) -> str:
    name = _config(weights).get("_name_or_path")
    return f" (its config.json names '{name}')" if isinstance(name, str) and name else ""


def _of(weights: Weights) -> str:
    folder = getattr(_source(weights), "folder", None)
    name = _json(folder / "adapter_config.json").get("base_model_name_or_path") if folder else None
    return f" of '{name}'" if isinstance(name, str) and name else ""


def _config(weights: Weights) -> dict[str, object]:
    folder = getattr(_source(weights), "folder", None)
    return _json(folder / "config.json") if folder else {}


def _json(file: Path) -> dict[str, object]:
    """The object in a file that only helps messages; nothing if it is not there or not sound."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in patterns)


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def _likewise(names: Sequence[str]) -> str:
    return f" ({len(names) - 1} more likewise)" if len(names) > 1 else ""


def _and_more(noun: str, names: Sequence[str]) -> str:
    """
    >>> _and_more("tensor", ["a"]), _and_more("tensor", ["a", "b", "c", "d"])
    ("tensor 'a'", "4 tensors ('a', 'b', 'c', ...)")
    """
    if len(names) == 1:
        return f"{noun} '{names[0]}'"
    shown = ", ".join(f"'{n}'" for n in names[:3])
    return f"{len(names)} {noun}s ({shown}{', ...' if len(names) > 3 else ''})"
