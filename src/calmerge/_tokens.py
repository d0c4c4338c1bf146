"""Vocabularies: one tokenizer for models that have several, with the rows of their embeddings put in its order."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from calmerge._errors import CheckpointError, did_you_mean
from calmerge._measure import Measure, total
from calmerge._rows import Rowed, Rows
from calmerge._side_files import as_json, config_of, json_file, tokenizer_files, with_config, with_edits
from calmerge._signature import Count, check
from calmerge._weights import Weights
from calmerge._yaml import Node


@dataclass(frozen=True)
class TokenRule:
    """Where the row of one token comes from, for models that lack it; for all of them with `force`.

    Attributes:
        model: a model's key; None for a row of zeros.
        token: the token whose row of that model is taken; the same one if None.
        token_id: the row, in place of a token.
        force: whether models that have the token get this row too.
        where: "file:line".
    """

    model: str | None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class TokenizerPlan:
    """Which tokenizer comes out, and where the rows of its tokens come from.

    Attributes:
        source: `union` (the base's tokens, then those of the others), `base`, or a model's key.
        tokens: rules for single tokens.
        pad_to_multiple_of: the embeddings get rows until their number is a multiple of this.
        prefer: the key of the model whose row a token gets in models that lack it, where it has one; None is no model.
        where: "file:line".
    """

    source: str
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    prefer: str | None = None
    where: str = field(default="", compare=False)


def aligned(models: Mapping[str, Weights], plan: TokenizerPlan) -> dict[str, Weights]:
    """The models with one vocabulary: embedding and head of each have one row for each token of the new tokenizer.

    A token that a model lacks gets the row of `plan.prefer`, or else the mean of the rows of all that have it, unless
    `plan.tokens` says otherwise. Rows behind the tokens are the mean of the rows before.

    Args:
        models: by key, the base first.
        plan: which tokens there are.

    Raises:
        CheckpointError: a model without `tokenizer.json`, or a rule that names what is not there.
    """
    vocabularies = {key: vocabulary(key, weights) for key, weights in models.items()}
    chosen = next(iter(models)) if plan.source in ("union", "base") else plan.source
    for named in (chosen, plan.prefer):
        if named is not None and named not in models:
            raise CheckpointError(
                f"{plan.where}: tokenizer: no model of this merge is '{named}'. {did_you_mean(named, models)}"
            )
    tokens = dict(vocabularies[chosen])
    end = max(tokens.values(), default=-1) + 1
    others = [key for key in models if key != chosen] if plan.source == "union" else []
    added = {entry["content"] for key in others for entry in _added(models[key])}
    union = [token for key in others for token in vocabularies[key]]
    for token in [*sorted(union, key=added.__contains__), *plan.tokens]:  # words of all models, then what was added
        if token not in tokens:
            tokens[token] = end
            end += 1
    padded = -(-end // (plan.pad_to_multiple_of or 1)) * (plan.pad_to_multiple_of or 1)
    names = {key: _embeddings(key, weights) for key, weights in models.items()}
    _check_rows({key: _rows(weights, names[key]) for key, weights in models.items()}, plan.tokens.values())
    sources = {token: _sources(token, vocabularies, plan.tokens.get(token), plan.prefer) for token in tokens}
    files = _tokenizer(models, vocabularies, chosen, tokens)
    result = {}
    for key, weights in models.items():
        table = _table(key, vocabularies[key], tokens, sources, plan.tokens, end)
        same = (
            end == padded and list(table) == [key] and torch.equal(table[key], torch.arange(_rows(weights, names[key])))
        )
        new = weights if same else _rebuilt(key, models, names[key], table, padded)
        result[key] = with_config(with_edits(new, files), config_of(weights) | {"vocab_size": padded})
    return result


def vocabulary(key: str, weights: Weights) -> dict[str, int]:
    """The id of every token of a model's `tokenizer.json`."""
    content = json_file(weights, "tokenizer.json")
    if not content:
        raise CheckpointError(
            f"'{key}' has no tokenizer.json, which aligning vocabularies needs. Save its fast tokenizer beside the "
            "weights, or leave the tokenizer section out if all vocabularies are the same."
        )
    known = content["model"].get("vocab", {})
    found = {t: i for i, (t, _) in enumerate(known)} if isinstance(known, list) else dict(known)
    found |= {entry["content"]: entry["id"] for entry in _added(weights)}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _added(weights: Weights) -> list[dict[str, Any]]:
    """The tokens that a model's tokenizer looks for before it cuts a text into words."""
    found: list[dict[str, Any]] = json_file(weights, "tokenizer.json").get("added_tokens", [])
    return found


# Where rows come from -------------------------------------------------------------------------------------------

Row = tuple[str, int]
"""A model's key and the number of one of its rows."""


def _sources(
    token: str, vocabularies: Mapping[str, Mapping[str, int]], rule: TokenRule | None, prefer: str | None
) -> list[Row]:
    """The rows whose mean stands for a token in models that lack it; none stands for zeros."""
    having = [(key, v[token]) for key, v in vocabularies.items() if token in v]
    if rule is not None:
        return _ruled(token, vocabularies, rule)
    return [row for row in having if row[0] == prefer] or having


def _check_rows(sizes: Mapping[str, int], rules: Iterable[TokenRule]) -> None:
    """Every row that a rule numbers is there."""
    for rule in rules:
        size = sizes.get(rule.model or "")
        if size is not None and rule.token_id is not None and not 0 <= rule.token_id < size:
            raise CheckpointError(
                f"{rule.where}: tokenizer: '{rule.model}' has {size} rows, so token_id is from 0 to {size - 1}; got "
                f"{rule.token_id}."
            )


def _ruled(token: str, vocabularies: Mapping[str, Mapping[str, int]], rule: TokenRule) -> list[Row]:
    if rule.model is None:
        return []
    if rule.model not in vocabularies:
        raise CheckpointError(
            f"{rule.where}: tokenizer: no model of this merge is '{rule.model}'. "
            f"{did_you_mean(rule.model, vocabularies)}"
        )
    if rule.token_id is not None:
        return [(rule.model, rule.token_id)]
    wanted = token if rule.token is None else rule.token
    theirs = vocabularies[rule.model]
    if wanted not in theirs:
        raise CheckpointError(
            f"{rule.where}: tokenizer: '{rule.model}' has no token '{wanted}'. {did_you_mean(wanted, theirs)}"
        )
    return [(rule.model, theirs[wanted])]


def _table(
    key: str,
    own: Mapping[str, int],
    tokens: Mapping[str, int],
    sources: Mapping[str, Sequence[Row]],
    rules: Mapping[str, TokenRule],
    end: int,
) -> dict[str, Tensor]:
    """By model, which of its rows goes into each row of `key`'s new embedding; -1 where none does."""
    table: dict[str, Tensor] = {}
    for token, i in tokens.items():
        forced = token in rules and rules[token].force
        for source, row in [(key, own[token])] if token in own and not forced else sources[token]:
            table.setdefault(source, torch.full((end,), -1))[i] = row
    return table


def _embeddings(key: str, weights: Weights) -> list[str]:
    """The tensors outside the layers that have one row for each token."""
    from calmerge._layers import layers

    inside = layers(weights.specs)
    size = config_of(weights).get("vocab_size")
    named = [n for n in weights if n not in inside and any(w in n for w in ("embed_tokens", "wte", "word_embeddings"))]
    rows = size if isinstance(size, int) else next((weights.specs[n].shape[0] for n in named), None)
    found = [
        name
        for name, spec in weights.specs.items()
        if name not in inside and spec.shape[:1] == (rows,) and spec.dtype.is_floating_point and "position" not in name
    ]
    if not found:
        raise CheckpointError(f"'{key}': no tensor has one row for each token (vocab_size {size}).")
    return found


def _rows(weights: Weights, names: Sequence[str]) -> int:
    return weights.specs[names[0]].shape[0]


def _rebuilt(
    key: str, models: Mapping[str, Weights], names: Sequence[str], table: Mapping[str, Tensor], padded: int
) -> Weights:
    own = models[key]
    for source, rows in table.items():
        for name in names:
            theirs = models[source].specs.get(name)
            if theirs is None or theirs.shape[1:] != own.specs[name].shape[1:]:
                raise CheckpointError(f"'{source}' has no tensor '{name}' whose rows fit those of '{key}'.")
            if int(rows.max()) >= theirs.shape[0]:
                raise CheckpointError(
                    f"'{source}': its tokenizer has the id {int(rows.max())}, but '{name}' has {theirs.shape[0]} rows. "
                    "Tokens were added without training them; resize the embedding first."
                )
    rowed = Rowed(own, names, Rows({source: (models[source], rows) for source, rows in table.items()}))
    end = len(next(iter(table.values())))
    if padded == end:
        return rowed
    means: dict[str, Measure] = {
        name: total(rowed.only_names([name]), lambda rows: rows.double().sum(0)).map(lambda s: s / end)
        for name in names
    }
    return Rowed(own, names, rowed.rows, padding=(padded, means))


# The new tokenizer ----------------------------------------------------------------------------------------------


def _tokenizer(
    models: Mapping[str, Weights],
    vocabularies: Mapping[str, Mapping[str, int]],
    chosen: str,
    tokens: Mapping[str, int],
) -> dict[str, bytes | None]:
    """The files of the tokenizer that comes out; where tokens were added, without those of older formats."""
    files = tokenizer_files(models[chosen])
    template = tokenizer_files(models[next(iter(models))])
    files |= (
        {name: template[name] for name in ("chat_template.jinja", "chat_template.json")}
        if not any(files[name] for name in ("chat_template.jinja", "chat_template.json"))
        else {}
    )
    added = {token: i for token, i in tokens.items() if token not in vocabularies[chosen]}
    if not added:
        return files
    content = json_file(models[chosen], "tokenizer.json")
    known = content["model"].get("vocab")
    special = {entry["content"]: entry for weights in models.values() for entry in _added(weights)}
    new: list[dict[str, Any]] = []
    for token, i in added.items():
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        if token in special or not any(token in v for v in vocabularies.values()) or not isinstance(known, dict):
            new.append({**plain, **special.get(token, {}), "id": i, "content": token})
        else:
            known[token] = i  # a word of another model's own vocabulary; as an added token it would cut words apart
    content["added_tokens"] = [*content.get("added_tokens", []), *new]
    if isinstance(known, dict):  # one that is not among the words would be numbered anew, from their number on
        known |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    settings = json_file(models[chosen], "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in new
        }
    stale = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "tokenizer.model", "spiece.model")
    return {
        **files,
        **dict.fromkeys(stale, None),
        "tokenizer.json": json.dumps(content, ensure_ascii=False, indent=2).encode(),
        "tokenizer_config.json": as_json(settings) if settings else None,
    }


# Reading --------------------------------------------------------------------------------------------------------


def read_tokenizer(
    node: Node, model_of: Callable[[str], str], base: str | None, problems: list[str]
) -> TokenizerPlan | None:
    """The plan that a `tokenizer:` section writes, the same in recipes and in mergekit's files.

    Args:
        node: text (the source), or `{source, tokens, pad_to_multiple_of}`.
        model_of: from a model as it is written to its key.
        base: the key of the base, if there is one, which is preferred.
        problems: gets one sentence for each mistake.
    """
    if isinstance(node.value, str):
        return TokenizerPlan(_source(node.value, model_of), prefer=base, where=node.where)
    if not node.is_mapping():
        problems.append(f"{node.where}: 'tokenizer' is union, base, a model, or {{source: union, tokens: ...}}.")
        return None
    faults = check(_keys_of_a_tokenizer, node.plain(), node.lines(), name="tokenizer", noun="key")  # type: ignore[arg-type]
    problems += faults
    if faults:
        return None
    rules = {}
    for token, entry in node.value["tokens"].items() if "tokens" in node.value else ():
        rule = _read_rule(token, entry, model_of, problems)
        if rule is not None:
            rules[token] = rule
    source = node.get("source")
    return TokenizerPlan(
        _source(source.value if source is not None else "union", model_of),
        rules,
        node.value["pad_to_multiple_of"].value if "pad_to_multiple_of" in node.value else None,
        model_of(node.value["prefer"].value) if "prefer" in node.value else base,
        node.where,
    )


def _source(text: str, model_of: Callable[[str], str]) -> str:
    return text if text in ("union", "base") else model_of(text.removeprefix("model:"))


def _read_rule(token: str, node: Node, model_of: Callable[[str], str], problems: list[str]) -> TokenRule | None:
    if not node.is_mapping():
        problems.append(f"{node.where}: the rule of token '{token}' is {{source: MODEL, force: false}}.")
        return None
    faults = check(_keys_of_a_rule, node.plain(), node.lines(), name=f"token '{token}'", noun="key")  # type: ignore[arg-type]
    source = node.get("source")
    if source is None:
        faults = faults or [f"{node.where}: the rule of token '{token}' needs the key 'source'."]
    force = node.value["force"].value if "force" in node.value else False
    if not faults and source is not None and source.is_mapping():
        plain: Any = source.plain()
        faults = check(_keys_of_a_row, plain, source.lines(), name=f"source of token '{token}'", noun="key")
        if not faults and plain["kind"] == "model_token":
            if "model" not in plain or ("token" in plain) == ("token_id" in plain):
                faults = [
                    f"{source.where}: the source of token '{token}' needs 'model', and one of 'token' and 'token_id'."
                ]
            else:
                return TokenRule(model_of(plain["model"]), plain.get("token"), plain.get("token_id"), force, node.where)
        if not faults:
            return TokenRule(None, force=force, where=node.where)
    elif not faults and source is not None and not isinstance(source.value, str):
        faults = [
            f"{source.where}: the source of token '{token}' is a model, {{kind: zero}}, or {{kind: model_token, ...}}."
        ]
    problems += faults
    return None if faults or source is None else TokenRule(model_of(source.value), force=force, where=node.where)


def _keys_of_a_tokenizer(
    *,
    source: str = "union",
    tokens: Mapping[str, Any] | None = None,
    pad_to_multiple_of: Count | None = None,
    prefer: str = "base",
) -> None:
    """The keys of a `tokenizer:` section, in a form that `check` can read."""


def _keys_of_a_rule(*, source: Any = None, force: bool = False) -> None:
    """The keys of one token's rule."""


def _keys_of_a_row(
    *, kind: Literal["zero", "model_token"], model: str = "", token: str = "", token_id: int = 0
) -> None:
    """The keys of a row's source."""
