"""mergekit's YAML, read whole and checked before any model is opened."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from calmerge._chat import check_template
from calmerge._errors import UsageError, did_you_mean
from calmerge._signature import raise_together
from calmerge._yaml import Node
from calmerge.mergekit.methods import WITHOUT_EFFECT, count_of, fault_in, parameters_of, per_model, role_of
from calmerge.mergekit.reference import Reference, read_reference
from calmerge.mergekit.settings import Setting, read_setting
from calmerge.methods.mergekit import MERGEKIT_METHODS

log = logging.getLogger("calmerge")
Parameters = Mapping[str, Setting]

_ROOT = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name",
)  # fmt: skip
_GONE = {
    "input_model_parameters": "Write each model's parameters under its entry in 'models'.",
    "embed_slerp": "Write 'tokenizer: {source: union}'; rows are then aligned by token.",
    "gate_mode": "Mixtures of experts (mergekit-moe) are not made here.",
    "experts": "Mixtures of experts (mergekit-moe) are not made here; a list of models to merge is 'models'.",
    "genome": "Evolution (mergekit-evolve) is not run here; 'calmerge list' shows methods that choose coefficients.",
    "write_model_card": "This is an option of mergekit's command line, and a card is always written here.",
}
_DTYPES = {
    "float32": "float32", "fp32": "float32", "f32": "float32", "float": "float32",
    "float16": "float16", "fp16": "float16", "f16": "float16", "half": "float16",
    "bfloat16": "bfloat16", "bf16": "bfloat16", "bfloat": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A model of a slice, the layers taken (all if None), and its parameters."""

    model: Reference
    layers: tuple[int, int] | None
    parameters: Parameters
    where: str = field(compare=False)


@dataclass(frozen=True)
class Slice:
    """Models whose layers are merged with each other."""

    sources: Sequence[Source]
    base: Reference | None
    parameters: Parameters
    where: str = field(compare=False)


@dataclass(frozen=True)
class Module:
    """A part of the model, by name; "default" is all of it."""

    name: str
    slices: Sequence[Slice]
    parameters: Parameters
    where: str = field(compare=False)


@dataclass(frozen=True)
class Document:
    """One merge of a file.

    Attributes:
        method: mergekit's name of the method.
        modules: what is merged; one called "default" for a file without `modules`.
        base: `base_model`.
        parameters: those at the root.
        dtype: the type of the result; None for that in which all models fit.
        tokenizer: its section, or the text of `tokenizer_source`.
        chat_template: as written.
        name: under which later documents use the result.
        where: "file:line".
    """

    method: str
    modules: Sequence[Module]
    base: Reference | None
    parameters: Parameters
    dtype: str | None
    tokenizer: Node | None
    chat_template: str | None
    name: str | None
    where: str = field(compare=False)

    def models(self) -> Iterator[Reference]:
        """All models that are named, some more than once."""
        for module in self.modules:
            for slice in module.slices:
                yield from (source.model for source in slice.sources)
                yield from [slice.base] if slice.base is not None else []
        yield from [self.base] if self.base is not None else []

    def settings(self) -> Iterator[Parameters]:
        """All parameters at all levels."""
        yield self.parameters
        for module in self.modules:
            yield module.parameters
            for slice in module.slices:
                yield slice.parameters
                for source in slice.sources:
                    yield source.parameters


def read_document(node: Node, names: Sequence[str] = ()) -> Document:
    """The merge that a document describes.

    Args:
        node: the document.
        names: of documents before it.

    Raises:
        UsageError: all mistakes together, each with its line.
    """
    if not node.is_mapping():
        raise UsageError(
            f"{node.where}: a merge is a mapping with the keys merge_method and models (or slices, modules)."
        )
    reading = _Reading(names)
    found = reading.document(node)
    raise_together(reading.problems)
    assert found is not None  # or there is a problem
    for remark in dict.fromkeys(reading.remarks):
        log.warning("%s", remark)
    return found


class _Reading:
    """One pass over a document, collecting mistakes and remarks."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.problems, self.remarks = names, list[str](), list[str]()
        self.method = ""

    def document(self, node: Node) -> Document | None:
        self._method(node)
        self._keys(node, _ROOT, "a merge")
        inputs = [key for key in ("models", "slices", "modules") if node.get(key) is not None]
        if len(inputs) != 1:
            got = " and ".join(inputs) or "none of them"
            self.problems.append(f"{node.where}: a merge has exactly one of models, slices and modules; here: {got}.")
        base = self._reference(node.get("base_model"))
        modules = [m for key in inputs[:1] for m in self._modules(key, node.value[key])]
        parameters = self._parameters(node.get("parameters"), of_model=False)
        dtype = self._dtype(node.get("out_dtype")) or self._dtype(node.get("dtype"))
        tokenizer = self._tokenizer(node)
        template = self._text(node, "chat_template")
        if template is not None:
            try:
                check_template(template)
            except UsageError as e:
                self.problems.append(f"{node.value['chat_template'].where}: {e}")
        document = Document(
            self.method, modules, base, parameters, dtype, tokenizer, template, self._text(node, "name"), node.where
        )
        if not self.problems:
            for slice in [s for m in modules for s in m.slices if s.sources]:
                self._check_models(slice, document)
        return document if not self.problems else None

    def _method(self, node: Node) -> None:
        stated = node.get("merge_method")
        if stated is None:
            self.problems.append(
                f"{node.where}: the key 'merge_method' is missing. {did_you_mean('', MERGEKIT_METHODS)}"
            )
        elif not isinstance(stated.value, str) or stated.value not in MERGEKIT_METHODS:
            text = str(stated.plain())
            plain = text.replace("-", "_").lower()
            hint = f"Did you mean '{plain}'?" if plain in MERGEKIT_METHODS else did_you_mean(text, MERGEKIT_METHODS)
            self.problems.append(f"{stated.where}: no merge_method is called '{text}'. {hint}")
        else:
            self.method = stated.value

    def _keys(self, node: Node, known: Sequence[str], what: str) -> None:
        parameters = parameters_of(self.method) if self.method else {}
        for key, part in node.items():
            if key in known:
                continue
            if key in _GONE:
                self.problems.append(f"{part.where}: '{key}' is not read. {_GONE[key]}")
            elif key in parameters or key in WITHOUT_EFFECT:
                self.problems.append(
                    f"{part.where}: '{key}' is a parameter; write it under 'parameters:', as in "
                    f"parameters: {{{key}: {part.plain()}}}."
                )
            elif key == "lora":
                self.problems.append(
                    f"{part.where}: an adapter is part of the model's name: model: BASE+ADAPTER, or model: {{model: "
                    "{path: BASE}, lora: {path: ADAPTER}}."
                )
            else:
                hint = did_you_mean(key, [*known, *parameters])
                self.problems.append(
                    f"{part.where}: {what} has no key '{key}'. {hint if 'mean' in hint else did_you_mean(key, known)}"
                )

    def _modules(self, key: str, node: Node) -> list[Module]:
        if key != "modules":
            return [Module("default", self._slices(key, node), {}, node.where)]
        if not node.is_mapping() or not node.value:
            self.problems.append(f"{node.where}: 'modules' is a mapping from a module's name to its models or slices.")
            return []
        found = []
        for name, part in node.items():
            self._keys(part, ("models", "slices", "parameters"), f"module '{name}'")
            inputs = [k for k in ("models", "slices") if part.get(k) is not None]
            if len(inputs) != 1:
                self.problems.append(f"{part.where}: module '{name}' needs one of models and slices.")
                continue
            slices = self._slices(inputs[0], part.value[inputs[0]])
            found.append(Module(name, slices, self._parameters(part.get("parameters"), of_model=False), part.where))
        return found

    def _slices(self, key: str, node: Node) -> list[Slice]:
        if not node.is_list() or not node.value:
            self.problems.append(f"{node.where}: '{key}' must be a list with at least one entry, got {node.plain()!r}.")
            return []
        if key == "models":
            sources = [s for one in node.value for s in self._source(one, sliced=False)]
            return [Slice(sources, None, {}, node.where)]
        found = []
        for one in node.value:
            self._keys(one, ("sources", "base_model", "parameters", "residual_weight"), "a slice")
            listed = one.get("sources")
            if listed is None or not listed.is_list() or not listed.value:
                self.problems.append(f"{one.where}: a slice needs 'sources', a list with at least one entry.")
                continue
            sources = [s for part in listed.value for s in self._source(part, sliced=True)]
            lengths = {s.layers[1] - s.layers[0] for s in sources if s.layers}
            if len(lengths) > 1:
                told = ", ".join(f"{s.model} {s.layers[1] - s.layers[0]}" for s in sources if s.layers)
                self.problems.append(
                    f"{one.where}: the sources of a slice must have as many layers each; here: {told}."
                )
            base = self._reference(one.get("base_model"))
            found.append(Slice(sources, base, self._parameters(one.get("parameters"), of_model=False), one.where))
        return found

    def _source(self, node: Node, *, sliced: bool) -> list[Source]:
        known = ("model", "layer_range", "parameters") if sliced else ("model", "parameters")
        what = "a source" if sliced else "an entry of models"
        if not node.is_mapping():
            self.problems.append(f"{node.where}: {what} is {{model: PATH, parameters: ...}}, got {node.plain()!r}.")
            return []
        self._keys(node, known, what)
        stated = node.get("model")
        model = self._reference(stated)
        if stated is None or stated.value is None:
            self.problems.append(f"{node.where}: {what} needs the key 'model'.")
        layers = self._layer_range(node) if sliced else None
        parameters = self._parameters(node.get("parameters"), of_model=True)
        return [Source(model, layers, parameters, node.where)] if model is not None else []

    def _layer_range(self, node: Node) -> tuple[int, int] | None:
        part = node.get("layer_range")
        if part is None:
            self.problems.append(f"{node.where}: a source needs 'layer_range', as in [0, 16].")
            return None
        plain = part.plain()
        whole = isinstance(plain, list) and len(plain) == 2 and all(type(i) is int for i in plain)
        if not whole or not 0 <= plain[0] < plain[1]:  # type: ignore[index, operator, call-overload]
            self.problems.append(
                f"{part.where}: layer_range is [first, end], counted from 0 and without the end, so that [0, 16] has "
                f"16 layers; got {plain}."
            )
            return None
        return plain[0], plain[1]  # type: ignore[index, return-value, call-overload]

    def _parameters(self, node: Node | None, *, of_model: bool) -> dict[str, Setting]:
        if node is None or node.value is None:
            return {}
        if not node.is_mapping():
            self.problems.append(f"{node.where}: 'parameters' is a mapping, got {node.plain()!r}.")
            return {}
        known = parameters_of(self.method) if self.method else {}
        found = {}
        for key, part in node.items():
            setting = read_setting(part, self.problems)
            if not self.method or setting is None:
                continue
            if key not in known:
                if key in WITHOUT_EFFECT:
                    if key != "int8_mask":
                        self.remarks.append(f"{part.where}: {self.method} has no parameter '{key}'; it has no effect.")
                    continue
                owners = [name for name in MERGEKIT_METHODS if key in parameters_of(name)]
                hint = f"It belongs to {', '.join(owners[:3])}." if owners else did_you_mean(key, known)
                hint = hint if known else f"{self.method} takes none. {hint}"
                self.problems.append(f"{part.where}: {self.method} has no parameter '{key}'. {hint}")
            elif of_model and not per_model(known[key]):
                self.problems.append(
                    f"{part.where}: '{key}' of {self.method} is one for all models; write it under 'parameters:' of "
                    "the slice or of the whole merge."
                )
            else:
                faults = [(at, fault_in(value, known[key])) for value, at in setting.scalars()]
                self.problems += [f"{at}: {self.method}: {key} {fault}" for at, fault in faults if fault]
                found[key] = setting
        return found

    def _check_models(self, slice: Slice, document: Document) -> None:
        """The base and the number of models fit the method."""
        models = [s.model for s in slice.sources]
        for position, model in enumerate(models):
            if model in models[:position]:
                self.problems.append(
                    f"{model.where}: '{model}' is listed twice. Add the weights of the two up into one."
                )
        base = slice.base or document.base
        role = role_of(self.method)
        sliced = slice.sources[0].layers is not None
        if base is None and role in ("base", "first"):
            self.problems.append(f"{document.where}: {self.method} needs 'base_model'.")
            return
        if base is not None and base not in models and sliced and role != "either":
            self.problems.append(
                f"{slice.where}: base_model '{base}' must be one of the sources of the slice, with its layer_range."
            )
            return
        others = [m for m in models if m != base]
        if role in ("model", "first"):
            others += [base] if base is not None else []
        least, most = count_of(self.method)
        if not least <= len(others) <= most:
            wanted = f"{least} model{'s' * (least != 1)}" if least == most else f"at least {least}"
            beside = " besides base_model" if role in ("base", "either") and base else ", base_model among them"
            self.problems.append(
                f"{slice.where}: {self.method} takes {wanted}{beside if base else ''}; here: "
                f"{', '.join(map(str, others)) or 'none'}."
            )

    def _reference(self, node: Node | None) -> Reference | None:
        return None if node is None or node.value is None else read_reference(node, self.problems, names=self.names)

    def _tokenizer(self, node: Node) -> Node | None:
        source, section = node.get("tokenizer_source"), node.get("tokenizer")
        if source is not None and section is not None:
            self.problems.append(f"{section.where}: a merge has 'tokenizer' or 'tokenizer_source', not both.")
        return section or source

    def _dtype(self, node: Node | None) -> str | None:
        if node is None or node.value is None:
            return None
        text = str(node.value).removeprefix("torch.").lower()
        if text not in _DTYPES:
            known = ("float32", "float16", "bfloat16")
            self.problems.append(f"{node.where}: no dtype is called '{node.value}'. {did_you_mean(text, known)}")
        return _DTYPES.get(text)

    def _text(self, node: Node, key: str) -> str | None:
        part: Any = node.get(key)
        if part is None or part.value is None:
            return None
        if not isinstance(part.value, str):
            self.problems.append(f"{part.where}: '{key}' is text, got {part.plain()!r}.")
            return None
        return part.value
