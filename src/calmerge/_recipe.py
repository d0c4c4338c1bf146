"""What a recipe is: base, experts and the steps of a merge, checked, and as they were written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calmerge._inputs import Input, Piece, Tower
from calmerge._pipe import DataUse, Methods, Step, data_used
from calmerge._yaml import Data, dump
from calmerge.suites.suite import Suite

if TYPE_CHECKING:
    from calmerge._tokens import TokenizerPlan

DType = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Out:
    """Where the result goes.

    Args:
        path: a folder that does not exist yet; None if the command line says.
        dtype: of the floating tensors; the base's own if None.
        shard: largest size of one file, such as "5GB".
        max_memory: private memory that the process may take, such as "2GB"; None for no limit.
        adapter: write a LoRA adapter instead of full weights: "exact", or `rank`, `energy` and `full` as `save_adapter`
            has them.
    """

    path: Path | None = None
    dtype: DType | None = None
    shard: str | int | None = None
    max_memory: str | int | None = None
    adapter: Mapping[str, Any] | Literal["exact"] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A checked recipe.

    Args:
        base: path (absolute) or hub id of what the experts were fine-tuned from, or another input (see `_inputs`); None
            for merges of the weights themselves.
        experts: path, hub id or other input by task.
        merge: the steps of the pipe.
        stack: inputs whose layers are put on top of each other, in place of base, experts and merge.
        towers: inputs of which each brings some of the tensors, in place of these as well.
        tokenizer: how the vocabularies are aligned; None leaves them.
        chat_template: of the result; None leaves the base's.
        exclude: shell patterns of tensors that are not merged.
        heads: shell patterns of tensors that are kept per task although all have them in one shape.
        tasks: the model's kind and the tasks' data, as a suite; None if the recipe has none.
        seed: given to every step that has a seed and names none; None leaves their defaults.
        out: where the result goes.
        data: the recipe as it was written.
        file: "recipe.yaml", for messages.
        folder: where relative paths start.
        lines: where base and experts are named, `{"base": "recipe.yaml:1", "experts.cars": "recipe.yaml:3"}`.
        name: what messages call the recipe where it is an input of another one.
    """

    base: Input | None
    experts: Mapping[str, Input]
    merge: Sequence[Step]
    stack: Sequence[Input] = ()
    towers: Sequence[Tower] = ()
    tokenizer: "TokenizerPlan | None" = None
    chat_template: str | None = None
    exclude: Sequence[str] = ()
    heads: Sequence[str] = ()
    tasks: Suite | None = None
    seed: int | None = None
    out: Out = field(default_factory=Out)
    data: Mapping[str, Data] = field(repr=False)
    file: str = "recipe"
    folder: Path = Path()
    lines: Mapping[str, str] = field(default_factory=dict, repr=False)
    name: str = "recipe"

    @property
    def without_heads(self) -> bool:
        """Whether all tensors have to be merged, none kept per task: merges of weights, and of aligned vocabularies."""
        return self.base is None or self.tokenizer is not None

    def inputs(self) -> list[Input]:
        """Base and experts, or the slices of the stack, or the towers."""
        named = [*([self.base] if self.base is not None else []), *self.experts.values()]
        return [*map(self.seeded, named), *self.parts()]

    def parts(self) -> list[Input]:
        """The slices of the stack, or the towers."""
        return [self.part(one) for one in [*self.stack, *(tower.source for tower in self.towers)]]

    @property
    def outline(self) -> str:
        """What a recipe without steps does: "a stack of 2 slices"."""
        what = f"a stack of {len(self.stack)} slice" if self.stack else f"{len(self.towers)} tower"
        return what + ("s" if len(self.parts()) > 1 else "")

    def seeded(self, source: Input) -> Input:
        """An input of this recipe; one that is a recipe without a seed has the seed of this one."""
        if isinstance(source, Piece) and isinstance(source.model, Recipe) and source.model.seed is None:
            return replace(source, model=with_seed(source.model, self.seed))
        return with_seed(source, self.seed) if isinstance(source, Recipe) and source.seed is None else source

    def part(self, source: Input) -> Input:
        """A slice or a tower of this recipe: as `seeded`, and rounded once, to the type that this one has."""
        part, dtype = self.seeded(source), self.out.dtype
        if isinstance(part, Recipe) and part.out.dtype is None and dtype is not None:
            return replace(part, out=replace(part.out, dtype=dtype))
        return part

    def models(self) -> list[Input]:
        """The inputs, those of a slice or a tower in its place where it is a recipe."""
        if not self.parts():
            return self.inputs()
        return [one for part in self.parts() for one in (part.models() if isinstance(part, Recipe) else [part])]

    def to_dict(self) -> dict[str, Data]:
        """The recipe as plain data, as it was written; `recipe_from_dict` reads it back."""
        return dict(self.data)

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return dump(self.to_dict())

    def needs_tasks(self, methods: Methods | None = None) -> bool:
        """Whether a step, or a merge inside one, learns from data."""
        return self.data_used(methods) != "none"

    def data_used(self, methods: Methods | None = None) -> DataUse:
        """What of the tasks' data the merge looks at."""
        return data_used(self.merge, table(methods))


def with_seed(recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe with another seed; the same if it is None."""
    return recipe if seed is None else replace(recipe, seed=seed, data={**recipe.data, "seed": seed})


def table(methods: Methods | None) -> Methods:
    """Functions by name; `calmerge.methods.METHODS` if none are given."""
    if methods is not None:
        return methods
    from calmerge.methods import METHODS

    found: Methods = METHODS
    return found
