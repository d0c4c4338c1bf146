"""mergekit's files as recipes: every parameter resolved for every tensor, equal tensors put together again."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from calmerge._errors import CheckpointError, UsageError, did_you_mean
from calmerge._inputs import Input, Piece
from calmerge._layers import layers
from calmerge._open import open_models
from calmerge._signature import name_of, raise_together
from calmerge._stack import Part, depth, some_layers
from calmerge._weights import Weights
from calmerge._yaml import Data, Node, dump, load_documents
from calmerge.mergekit.document import Document, Module, Parameters, Slice, Source, read_document
from calmerge.mergekit.methods import default_of, fault_in, parameters_of, per_model, role_of
from calmerge.mergekit.modules import PATHS, check_modules, module_of
from calmerge.mergekit.patterns import cases
from calmerge.mergekit.patterns import depth as depth_of
from calmerge.mergekit.reference import Reference, parse_reference
from calmerge.mergekit.settings import Scalar, Setting
from calmerge.methods.mergekit import MERGEKIT_METHODS
from calmerge.recipe import Recipe, recipe_from_dict
from calmerge.suites.suite import located

log = logging.getLogger("calmerge")

Options = tuple[tuple[str, Any], ...]
"""What a method is called with: names and values, as something that can be compared."""


def load_mergekit(path: str | Path, *, folder: str | Path = ".") -> Recipe:
    """The recipe that says the same as a file of mergekit's.

    Args:
        path: the file; of several documents the last is the merge, those before it are its inputs.
        folder: where relative paths start.

    Raises:
        UsageError: mistakes in the file, all of a document together, each with its line.
        CheckpointError: a model cannot be opened, where its tensors are needed to resolve a parameter.
    """
    return recipe_from_dict(convert(path, folder=folder, there=True), folder=folder, file=Path(path).name)


def convert(path: str | Path, *, folder: str | Path = ".", there: bool = False) -> dict[str, Data]:
    """A file of mergekit's as the data of a recipe; see `load_mergekit`. `there` says that all models have to be."""
    nodes = load_documents(path)
    made: dict[str, dict[str, Data]] = {}
    for position, node in enumerate(nodes):
        document = read_document(node, list(made))
        if there:
            _check_places(document, list(made), Path(folder).resolve())
        found = _Conversion(document, made, Path(folder).resolve()).recipe()
        if position == len(nodes) - 1:
            return found
        if document.name is None:
            raise UsageError(
                f"{document.where}: every document but the last needs a 'name', under which others use it."
            )
        if document.name in made:
            raise UsageError(f"{document.where}: two documents are called '{document.name}'.")
        made[document.name] = found
    raise UsageError(f"{path}: the file is empty.")


def convert_file(path: str | Path, *, out: str | Path | None = None) -> str:
    """The recipe that says the same as a file of mergekit's, as text.

    Args:
        path: the file; relative paths in it start where you are.
        out: where the text is going to lie, if not where you are: relative paths then start there.
    """
    found = convert(path)
    if out is not None:
        found = _relocated(found, Path(), Path(out).resolve().parent)
    return f"# {Path(path).name}, as calmerge convert reads it.\n{dump(found, compact=True)}"


def _check_places(document: Document, names: Sequence[str], folder: Path) -> None:
    """Every local model of a document is there."""
    problems: list[str] = []
    for model in document.models():
        for text in (model.model, model.adapter):
            place = located(text, folder) if text is not None and text not in names else None
            if isinstance(place, Path) and not place.exists():
                problems.append(f"{model.where}: no model is at '{text}'; relative paths start at {folder}.")
    raise_together(list(dict.fromkeys(problems)), CheckpointError)


_Names = Mapping[str, Sequence[str]] | None
"""By model, the tensors that belong to a module."""
_Call = tuple[Options, tuple[int, ...] | None]
"""Options of a method, and which of the sources it is called on; None for all."""


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the result: its name, its module's parameters, its depth, and its name in each source."""

    name: str
    module: Module
    t: float
    names: Sequence[str]


class _Conversion:
    """One document on its way to a recipe."""

    def __init__(self, document: Document, made: Mapping[str, Mapping[str, Data]], folder: Path) -> None:
        self.document, self.made, self.folder = document, made, folder
        self.opened: dict[str, Weights] = {}
        self.missed: dict[tuple[str, str], str] = {}  # filters that fitted no tensor yet, and their places
        self.hit: set[tuple[str, str]] = set()

    def recipe(self) -> dict[str, Data]:
        modules = list(self.document.modules)
        found: dict[str, Data] = {}
        if len(modules) == 1:
            found |= self._stack(modules[0].slices, modules)
        elif any(len(module.slices) > 1 or module.slices[0].sources[0].layers for module in modules):
            found["towers"] = self._towers(modules)
        else:
            found |= self._stack([self._every(modules)], modules)
        self._check_filters()
        slices = [slice for module in modules for slice in module.slices]
        if self.document.tokenizer is not None:
            found["tokenizer"] = self._tokenizer(self.document.tokenizer, slices)
        if self.document.chat_template is not None:
            found["chat_template"] = self.document.chat_template
        dtype = self.document.dtype or self._common_dtype(slices)
        if dtype is not None:
            found["out"] = {"dtype": dtype}
        return found

    def _every(self, modules: Sequence[Module]) -> Slice:
        """All models of some modules as one slice."""
        every: dict[str, Source] = {}
        for source in (source for module in modules for slice in module.slices for source in slice.sources):
            every.setdefault(str(source.model), replace(source, layers=None))
        return replace(modules[0].slices[0], sources=list(every.values()))

    def _stack(self, slices: Sequence[Slice], modules: list[Module], names: _Names = None) -> dict[str, Data]:
        """Slices, from the bottom to the top, as a recipe.

        Args:
            slices: each a merge, or layers of one model.
            modules: those that their tensors may be part of.
            names: by model, the tensors that there are; all if None.
        """
        parts: list[dict[str, Data]] = []
        start = 0
        for position, slice in enumerate(slices):
            part = Part(start, position == 0, position == len(slices) - 1)
            parts.append(self._slice(slice, modules, part, names))
            start += self._length(slice, names) if len(slices) > 1 else 0
        return parts[0] if len(parts) == 1 and "merge" in parts[0] else {"stack": [_plain(part) for part in parts]}

    def _towers(self, modules: list[Module]) -> list[Data]:
        """Modules as recipes of their own, and what belongs to none of them as the last."""
        every = self._every(modules)
        opened = {str(model): list(self._open(model)) for model in self.document.models()}
        groups: dict[str, list[str]] = {}
        for name in dict.fromkeys(name for names in opened.values() for name in names):
            groups.setdefault(module_of(name, modules).name, []).append(name)
        check_modules(modules, set(groups))
        found: list[Data] = []
        hints = [path for module in modules for path in (module.name, *PATHS.get(module.name, ()))]
        for key, patterns in cases(groups, hints):
            inside = set(groups[key])
            own = {model: [name for name in names if name in inside] for model, names in opened.items()}
            module = next((m for m in modules if m.name == key), None)
            if module is not None:
                made = self._stack(module.slices, [module], own)
            else:  # of one model, where they are not merged
                sources = every.sources[:1] if self.document.method == "passthrough" else every.sources
                rest = Module("", (), {}, every.where)
                made = self._stack([replace(every, sources=sources)], [rest], own)
            tower: dict[str, Data] = {"tensors": [*patterns]} if patterns else {}
            match made:
                case {"stack": [str(model)]}:
                    made = {"model": model}
                case {"stack": [dict(taken)]}:
                    made = taken
            found.append(tower | made)
        return found

    # A slice ------------------------------------------------------------------------------------------------

    def _slice(self, slice: Slice, modules: list[Module], part: Part, own: _Names) -> dict[str, Data]:
        """A slice as a recipe, or as the one model that it takes unchanged."""
        base, sources = self._order(slice)
        groups = self._groups(slice, sources, modules, part, own)
        if self.document.method == "passthrough" and all(
            chosen is None and dict(options).get("scale", [1.0]) == [1.0] for options, chosen in groups
        ):
            return {"": self._input(sources[0])}
        names = _task_names([s.model for s in sources])
        found: dict[str, Data] = {"base": None if base is None else self._input(base)}
        found["experts"] = {name: self._input(source) for name, source in zip(names, sources, strict=True)}
        method = name_of(MERGEKIT_METHODS[self.document.method])
        hints = sorted({e.filter for p in self.document.settings() for s in p.values() for e in s.entries if e.filter})
        ordered = cases(groups, hints)

        def steps(key: _Call) -> list[Data]:
            options, chosen = key
            plain = {_own(key): list(v) if isinstance(v, tuple) else v for key, v in options}
            some: list[Data] = [] if chosen is None else [{"only": {"experts": [names[i] for i in chosen]}}]
            return [*some, {method: plain} if plain else method]

        if len(ordered) == 1:
            found["merge"] = steps(ordered[0][0])
        else:
            listed: list[Data] = []
            for key, patterns in ordered:
                case: dict[str, Data] = {"tensors": [*patterns]} if patterns else {}
                made = steps(key)
                listed.append(case | {"merge": made if len(made) > 1 else made[0]})
            found["merge"] = [{"where": listed}]
        return found

    def _order(self, slice: Slice) -> tuple[Source | None, list[Source]]:
        """The base, if the method compares with one, and the other models in the order in which they are merged."""
        base = slice.base or self.document.base
        sources = list(slice.sources)
        if base is None:
            return None, sources
        listed = next((s for s in sources if s.model == base), None)
        others = [s for s in sources if s.model != base]
        first = listed or Source(base, others[0].layers if others else None, {}, slice.where)
        if role_of(self.document.method) in ("base", "either"):
            return first, others
        return None, [first, *others]

    def _length(self, slice: Slice, own: _Names) -> int:
        layers = slice.sources[0].layers
        return layers[1] - layers[0] if layers else depth(self._open(slice.sources[0].model, own))[1]

    # Parameters ---------------------------------------------------------------------------------------------

    def _groups(
        self, slice: Slice, sources: Sequence[Source], modules: list[Module], part: Part, own: _Names
    ) -> dict[_Call, list[str]]:
        """The tensors of a slice by what the method is called with for them, and on which of the sources."""
        levels = [p for s in sources for p in (s.parameters,)] + [slice.parameters, self.document.parameters]
        levels += [module.parameters for module in modules]
        if len(modules) == 1 and all(setting.constant for level in levels for setting in level.values()):
            return {(self._options(slice, sources, _Tensor("", modules[0], 0.0, [""] * len(sources))), None): [""]}
        groups: dict[_Call, list[str]] = {}
        order = [str(source.model) for source in sources]
        for tensor in self._tensors(sources, modules, part, own):
            some, chosen = sources, None
            if len(modules) > 1 and tensor.module.slices:
                some = self._order(tensor.module.slices[0])[1]
                places = tuple(order.index(str(source.model)) for source in some)
                chosen = None if places == tuple(range(len(order))) else places
                tensor = replace(tensor, names=[tensor.name] * len(some))
            groups.setdefault((self._options(slice, some, tensor), chosen), []).append(tensor.name)
        return groups

    def _options(self, slice: Slice, sources: Sequence[Source], tensor: _Tensor) -> Options:
        found: list[tuple[str, Any]] = []
        above = (slice.parameters, tensor.module.parameters, self.document.parameters)
        for key, option in parameters_of(self.document.method).items():
            if not per_model(option):
                value = self._value(key, above, tensor.name, tensor.t)
                if isinstance(value, float) and value.is_integer() and fault_in(value, option):
                    value = int(value)  # a gradient makes numbers of any kind floats
                if value is None and option.required:
                    raise UsageError(
                        f"{slice.where}: {self.document.method} needs the parameter '{key}'{_for(tensor)}."
                    )
                found += [(key, value)] if value is not None else []
                continue
            values = [
                self._value(key, (source.parameters, *above), name, tensor.t)
                for source, name in zip(sources, tensor.names, strict=True)
            ]
            if option.required and None in values:
                source = sources[values.index(None)]
                raise UsageError(
                    f"{source.where}: {self.document.method} needs the parameter '{key}' of '{source.model}'"
                    f"{_for(tensor)}. Write it under the model's 'parameters:', or under those of the whole merge."
                )
            if any(v is not None for v in values):
                whole = [float(default_of(option) if v is None else v) for v in values]
                found.append((key, (whole[0],) if len(set(whole)) == 1 else tuple(whole)))
        self._check_sum(slice, dict(found), tensor)
        return tuple(found)

    def _value(self, key: str, levels: Sequence[Parameters], name: str, t: float) -> Scalar | None:
        """The value of a parameter for a tensor, from the first level that has one."""
        for level in levels:
            if key in level:
                self._note(level[key], name)
                value = level[key].at(name, t)
                if value is not None:
                    return value
        return None

    def _note(self, setting: Setting, name: str) -> None:
        for entry in setting.entries:
            if entry.filter is not None:
                place = (entry.where, entry.filter)
                self.missed.setdefault(place, name)
                if entry.filter in name:
                    self.hit.add(place)

    def _check_filters(self) -> None:
        """A filter that fits no tensor of any model is a mistake; one that fits some, but none here, has no effect."""
        names = {name for weights in self.opened.values() for name in weights} | {"lm_head"}  # a tied one is not stored
        for where, text in self.missed:
            if (where, text) in self.hit:
                continue
            if self.opened and not any(text in name for name in names):
                parts = {part for name in names for part in name.split(".")}
                raise UsageError(f"{where}: the filter '{text}' fits no tensor. {did_you_mean(text, parts)}")
            log.warning("%s: the filter '%s' has no effect, since it takes no tensor.", where, text)

    def _check_sum(self, slice: Slice, options: Mapping[str, Any], tensor: _Tensor) -> None:
        if self.document.method == "linear" and options.get("normalize", True):
            weights = options["weight"]
            if abs(sum(weights)) < 1e-8:
                raise UsageError(
                    f"{slice.where}: linear divides by the sum of the weights, which is 0 here{_for(tensor)}. Change "
                    "the weights, or set normalize: false."
                )

    # Tensors ------------------------------------------------------------------------------------------------

    def _tensors(self, sources: Sequence[Source], modules: list[Module], part: Part, own: _Names) -> list[_Tensor]:
        """All tensors that come out of a slice."""
        views = []
        for source in sources:
            whole = self._open(source.model, own)
            view = some_layers(whole, source.layers, part, label=str(source.model))
            stack, count = depth(whole)
            first = source.layers[0] if source.layers else 0
            views.append((view, stack, first, (source.layers[1] - first) if source.layers else count))
        found = []
        view, stack, _, count = views[0]
        inside = layers(self._open(sources[0].model, own).specs)
        for name in view:
            index = _index(name, stack)
            if sources[0].layers is None:
                t = depth_of(inside[name].index, inside[name].count) if name in inside else 0.0
                names = [name] * len(sources)
            elif index is None:
                t, names = 0.0, [name] * len(sources)
            else:
                t = depth_of(index - part.start, count)
                names = [_moved(name, stack, index - part.start + start) for _, _, start, _ in views]
            found.append(_Tensor(name, module_of(name, modules), t, names))
        if len(modules) > 1:
            check_modules(modules, {tensor.module.name for tensor in found})
        return found

    def _open(self, model: Reference, own: _Names = None) -> Weights:
        key = str(model)
        if key not in self.opened:
            source: Input = self._native(model)
            self.opened |= {key: next(iter(open_models([source]).values()))}
        return self.opened[key] if own is None else self.opened[key].only_names(own[key])

    def _native(self, model: Reference) -> Input:
        if model.model in self.made:
            found: Any = recipe_from_dict(self.made[model.model], folder=self.folder)
        else:
            found = located(model.model, self.folder)
        return Piece(found, located(model.adapter, self.folder)) if model.adapter else found

    # What a recipe writes -----------------------------------------------------------------------------------

    def _input(self, source: Source) -> Data:
        model: Data = dict(self.made[source.model.model]) if source.model.model in self.made else source.model.model
        if source.model.adapter is None and source.layers is None:
            return model
        found: dict[str, Data] = {"model": model}
        if source.model.adapter is not None:
            found["adapter"] = source.model.adapter
        if source.layers is not None:
            found["layers"] = list(source.layers)
        return found

    def _tokenizer(self, node: Node, slices: Sequence[Slice]) -> Data:
        """The section with models as a recipe names them: as `base`, or by the name of the expert."""
        names: dict[str, str] = {}
        for slice in slices:
            base, sources = self._order(slice)
            tasks = _task_names([s.model for s in sources])
            names |= {str(s.model): task for s, task in zip(sources, tasks, strict=True)}
            names |= {str(base.model): "base"} if base is not None else {}

        def renamed(data: Data) -> Data:
            if not isinstance(data, dict):
                return data
            found = {key: renamed(value) for key, value in data.items()}
            for key in ("source", "model"):
                text = found.get(key)
                if isinstance(text, str) and text not in ("union", "base"):
                    text = str(parse_reference(text.removeprefix("model:"), node.where, list(self.made)))
                    found[key] = names.get(text, text)
            return found

        plain = node.plain()
        found = renamed({"source": plain} if isinstance(plain, str) else plain)
        preferred = names.get(str(self.document.base), "base")
        if preferred != "base" and isinstance(found, dict):
            found["prefer"] = preferred
        return found

    def _common_dtype(self, slices: Sequence[Slice]) -> str | None:
        """The type in which all models fit, where that is not the base's own."""
        models = [m for slice in slices for m in [self._order(slice)[0], *self._order(slice)[1]] if m is not None]
        if len({str(m.model) for m in models}) < 2:
            return None
        opened: list[Weights] = [self._open(m.model) for m in models]
        types = [{s.dtype for s in w.specs.values() if s.dtype.is_floating_point} for w in opened]
        if all(t == types[0] for t in types):
            return None
        return str(reduce(torch.promote_types, [d for t in types for d in t])).removeprefix("torch.")


def _relocated(data: Any, here: Path, there: Path) -> Any:
    """Recipe data whose local paths start at another folder."""

    def moved(text: str) -> str:
        place = located(text, here.resolve())
        return os.path.relpath(place, there) if isinstance(place, Path) and not Path(text).is_absolute() else text

    if isinstance(data, str):
        return moved(data)
    found = dict(data)
    for key in ("base", "model", "adapter"):
        if isinstance(found.get(key), (str, dict)):
            found[key] = _relocated(found[key], here, there)
    if "experts" in found:
        found["experts"] = {task: _relocated(at, here, there) for task, at in found["experts"].items()}
    for key in ("stack", "towers"):
        if key in found:
            found[key] = [_relocated(one, here, there) for one in found[key]]
    return found


def _plain(part: dict[str, Data]) -> Data:
    return part.get("", part)


def _own(key: str) -> str:
    """mergekit's name of a parameter as Python can write it."""
    return "lambda_" if key == "lambda" else key


def _for(tensor: _Tensor) -> str:
    return f" for '{tensor.name}'" if tensor.name else ""


def _index(name: str, stack: str) -> int | None:
    found = re.match(rf"{re.escape(stack)}\.(\d+)\.", name) if stack else None
    return int(found[1]) if found else None


def _moved(name: str, stack: str, index: int) -> str:
    return f"{stack}.{index}.{name.removeprefix(stack).lstrip('.').partition('.')[2]}"


def _task_names(models: Sequence[Reference]) -> list[str]:
    """A short name for every model: the end of its path."""
    names: list[str] = []
    for model in models:
        text = Path((model.adapter or model.model).partition("@")[0]).name
        text = re.sub(r"[^\w.-]", "-", text).lstrip("-.") or "model"
        number = 2
        name = text
        while name in names:
            name, number = f"{text}-{number}", number + 1
        names.append(name)
    return names
