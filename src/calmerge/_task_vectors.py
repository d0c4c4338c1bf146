"""Task vectors: what each expert adds to the base, tau_t = theta_t - theta_0, read in blocks of [T, rows, ...]."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeGuard

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmerge._align import aligned_names
from calmerge._checkpoint import Checkpoint, Source, open_checkpoint
from calmerge._compatibility import is_vocabulary, misfits, repeats, unfit
from calmerge._errors import CheckpointError, UsageError, did_you_mean
from calmerge._lora import Adapted, Adapter, Factors, adapted
from calmerge._signature import raise_together
from calmerge._tied import tied_names, without_doubles
from calmerge._watch import finite
from calmerge._weights import ALL, Computed, Gathered, Memo, Node, Spec, StateDict, Weights, digest, row_size

if TYPE_CHECKING:
    from calmerge._threshold import Cut

_TASK = re.compile(r"\w[\w.-]*")
Merge = Callable[["TaskVectors"], Weights]
"""From task vectors to one delta: what `inner=` takes. `functools.partial` configures it."""


class TaskVectors(Weights):
    """The differences between T experts and their base; `read(name)` is [T, *shape] in float32.

    Attributes:
        tasks: names of the experts, in the order of the first dimension.
        base: all tensors of the base.
        specs: the tensors that are merged, with the shape that one expert has.
        experts: by task, all tensors of that expert under the base's names.
        heads: by task, the tensors which that expert has for itself, under the expert's own names.
        skipped: tensors of the base that are not merged, with the reason; all but tied ones are copied as they are.
        cut: how they were trimmed, if nothing else was done to them since.
    """

    row_dim = 1
    cut: "Cut | None" = None

    def __init__(
        self,
        source: Weights,
        tasks: Sequence[str],
        base: Weights,
        *,
        experts: Mapping[str, Weights],
        heads: Mapping[str, Weights] | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self._source, self.tasks, self.base = source, tuple(tasks), base
        self.inputs = (source,)
        self.specs, self.elementwise = source.specs, source.elementwise
        self.experts = dict(experts)
        self.heads = dict(heads or {})
        self.skipped = dict(skipped or {})

    def whole(self, name: str) -> bool:
        """Whether the task vectors of this tensor must be computed for all rows at once."""
        return self._source.whole(name)

    def parts(self, name: str) -> Sequence[Node]:
        """What they are read from."""
        return self.inputs

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        """The task vectors of one tensor, or of some of its rows: [T, rows, ...], float32."""
        return self._source.read(name, rows, memo)

    def transform(
        self, fn: Callable[..., Tensor], *others: Node, elementwise: bool = True, copies: int | None = None
    ) -> "TaskVectors":
        """Task vectors of the same shape, `fn(tau, *others, site)` for every block; see `map` for the arguments.

        >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
        >>> tvs.transform(lambda tau, site: 3 * tau)["w"]
        tensor([[3., 3.]])
        """
        return self._with(Stacked(fn, (self, *others), self.specs, elementwise=elementwise, copies=copies))

    def reduce(
        self, fn: Callable[..., Tensor], *others: Node, elementwise: bool = True, copies: int | None = None
    ) -> Weights:
        """One delta out of T task vectors, `fn(tau, *others, site)` with tau of shape [T, ...]; see `map`.

        >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}})
        >>> tvs.reduce(lambda tau, site: tau.sum(0))["w"]
        tensor([2., 2.])
        """
        return Computed(fn, (self, *others), _float32(self.specs), elementwise=elementwise, copies=copies)

    def replaced(self, some: "TaskVectors") -> "TaskVectors":
        """The same task vectors but for the tensors of `some`, which are taken from there.

        >>> base, ones = {"w": torch.zeros(1), "b": torch.zeros(1)}, {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tvs = task_vectors(base, {"a": ones})
        >>> dict(tvs.replaced(tvs.only_names(["b"]).transform(lambda tau, site: 3 * tau)))
        {'w': tensor([[1.]]), 'b': tensor([[3.]])}
        """
        return self._with(Gathered({n: (some if n in some.specs else self, n) for n in self.specs}))

    def only(self, tasks: Iterable[str]) -> "TaskVectors":
        """The task vectors of some tasks, in the order given; the other experts are not read where that is possible.

        >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}})
        >>> tvs.only(["b"]).tasks
        ('b',)
        """
        tasks = tuple(tasks)
        for task in tasks:
            if task not in self.tasks:
                raise UsageError(f"no task '{task}'. {did_you_mean(task, self.tasks)}")
        if isinstance(self._source, _Deltas):
            some = self._source.only([self.tasks.index(t) for t in tasks])
            return self._with(some, tasks).only_names(self.specs)
        index = torch.tensor([self.tasks.index(t) for t in tasks])
        return self._with(Stacked(lambda tau, site: tau[index], (self,), self.specs), tasks)

    def of(self, task: str) -> Weights:
        """One task's vector.

        >>> task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}}).of("a")["w"]
        tensor([1.])
        """
        return self.only([task]).reduce(lambda tau, site: tau[0])

    def over(self, base: Weights) -> "TaskVectors":
        """The same vectors over another base, such as the model that an iterated merge has come to.

        >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
        >>> tvs.over(StateDict({"w": torch.full((1,), 5.0)})).base["w"]
        tensor([5.])
        """
        return TaskVectors(self, self.tasks, base, experts=self.experts, heads=self.heads, skipped=self.skipped)

    def ranks(self, name: str, *, copies: bool = False) -> tuple[int, ...] | None:
        """By task, the rank of its vector of one tensor, where all of them are known as products of factors.

        That is so for adapters, as long as nothing was done to the vectors. It is told from headers alone. With
        `copies` full tensors beside factors are taken for copies of the base's own, which PEFT saves of embeddings.

        >>> task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}}).ranks("w") is None
        True
        """
        if not isinstance(self._source, _Deltas):
            return None
        found = [w.rank(name, copies=copies) if _on(w, self.base) else None for _, w in self._source.experts]
        return None if None in found else tuple(r for r in found if r is not None)

    def factors(self, name: str) -> list[Factors]:
        """By task, the factors of its vector of a tensor that has `ranks`, with copies or without."""
        assert isinstance(self._source, _Deltas)
        found = [(task, w.factors(name)) for task, w in self._source.experts if isinstance(w, Adapted)]
        for task, factors in found:
            for part in (factors.left, factors.right):
                _refuse_nonfinite(f"expert '{task}'", name, part)
        return [factors for _, factors in found]

    def expert(self, task: str) -> dict[str, Tensor]:
        """One expert's tensors under the base's names, in memory, floating ones in float32; without its head.

        >>> task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1), "head": torch.ones(2)}}).expert("a")
        {'w': tensor([1.])}
        """
        whole = {name: self.experts[task].read(name) for name in own_names(self, task)}
        return {name: w.float() if w.is_floating_point() else w for name, w in whole.items()}

    def to(self, device: torch.device) -> "TaskVectors":
        """The task vectors computed where `device` says.

        >>> tvs = task_vectors({"w": torch.zeros(1)}, {"a": {"w": torch.ones(1)}})
        >>> tvs.to(torch.device("cpu")) is tvs
        True
        """
        if device.type == "cpu":
            return self
        return self.transform(lambda tau, site: tau.to(device))

    def spill(self, folder: Path) -> "TaskVectors":
        """The same task vectors, computed once and read from a file in `folder` from then on (T x P float32 numbers).

        >>> import tempfile; from pathlib import Path
        >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tvs.transform(lambda tau, site: 3 * tau).spill(Path(folder))["w"]
        tensor([[3., 3.]])
        """
        files = []
        for i, name in enumerate(self.specs):
            files.append(folder / f"{i}.safetensors")
            save_file({name: self.read(name).cpu().contiguous()}, files[-1])
        return self._with(_Rows(Checkpoint(files, label="spilled task vectors"), self.specs)).to(self._device())

    @property
    def fingerprint(self) -> str:
        """Changes when base or experts do, or what was done to the vectors, as far as some of the values tell."""
        inputs = "/".join(w.fingerprint for w in (self.base, *self.experts.values()))
        if isinstance(self._source, _Deltas):
            return inputs
        return inputs + "/" + digest([(name, self._some(name)) for name in self.specs])

    def _some(self, name: str) -> str:
        """A digest of the first rows, about 4,096 entries a task; of the whole tensor, where it must be read whole."""
        spec = self.specs[name]
        rows = slice(0, max(1, 4096 // max(1, row_size(spec)))) if self.elementwise and spec.shape else ALL
        return digest(self.read(name, rows).cpu().contiguous().numpy().tobytes())

    def _device(self) -> torch.device:
        return self.read(min(self.specs, key=lambda n: self.specs[n].numel)).device

    def _with(self, source: Weights, tasks: Sequence[str] | None = None) -> "TaskVectors":
        tasks = self.tasks if tasks is None else tasks
        experts = {t: self.experts[t] for t in tasks}
        heads = {t: self.heads[t] for t in tasks if t in self.heads}
        return TaskVectors(source, tasks, self.base, experts=experts, heads=heads, skipped=self.skipped)


def task_vectors(
    base: Source,
    experts: Mapping[str, Source],
    *,
    exclude: Sequence[str] = (),
    heads: Sequence[str] = (),
    repeated: bool = False,
    where: Mapping[str, str] = MappingProxyType({}),
) -> TaskVectors:
    """The task vectors of `experts` over `base`, from headers alone: no tensor is read yet.

    Every tensor falls into one of three kinds. *Merged*: floating, in the base and in all experts, with one shape.
    *Head*: only experts have it, or its first dimension (the classes) differs from the base's; kept per task.
    *Skipped*: integers and booleans, what `exclude` names, and what no expert has; taken from the base. Tied tensors
    are one: the double of an embedding is neither merged nor written.

    Experts whose names carry one more prefix than the base's (`bert.`), or one less, are matched without it. An adapter
    (PEFT folder) is an expert like any other: its task vector is s B A, and 0 where it changes nothing.

    Args:
        base: what the experts were fine-tuned from; see `open_checkpoint` for what may stand here.
        experts: by task name.
        exclude: shell patterns (`*embeddings*`) of base names that are not merged.
        heads: shell patterns of names that are kept per task even where base and experts have them in one shape.
        repeated: whether one checkpoint may be given twice, or the base as an expert; mostly that is a slip.
        where: where base and experts were named, `{"base": "recipe.yaml:1", "experts.cars": "recipe.yaml:3"}`.

    Raises:
        CheckpointError: no expert, one that cannot be read or is given twice, another architecture, depth or
            vocabulary, a missing tensor, a shape that differs beyond the classes; all mistakes together.
        UsageError: a pattern in `exclude` or `heads` that fits nothing.

    >>> base = {"w": torch.zeros(2), "steps": torch.tensor(7)}
    >>> tvs = task_vectors(base, {"cars": {"w": torch.ones(2), "steps": torch.tensor(9), "head": torch.ones(3)}})
    >>> tvs["w"], tvs.skipped, list(tvs.heads["cars"])
    (tensor([[1., 1.]]), {'steps': 'integer tensor'}, ['head'])
    """
    if not experts:
        raise CheckpointError("no expert is given; a merge needs at least one.")
    for task in experts:
        if not _TASK.fullmatch(task):
            raise UsageError(
                f"expert '{task}': its name becomes a folder's; use letters, digits, '-', '_' and '.', and begin with "
                "a letter or digit."
            )
    opened_base, opened, tied = _open_all(base, experts, exclude, where, repeated=repeated)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in opened_base):
            raise UsageError(f"exclude: '{pattern}' fits no tensor of the base. {did_you_mean(pattern, opened_base)}")
    everything = {name for weights in (opened_base, *opened.values()) for name in weights}
    for pattern in heads:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise UsageError(
                f"heads: '{pattern}' fits no tensor of base or experts. {did_you_mean(pattern, everything)}"
            )
    skipped = {double: f"tied to '{kept}', written once" for double, kept in tied.items()}
    merged: dict[str, Spec] = {}
    own: set[str] = set()
    for name, spec in opened_base.specs.items():
        having = {t: w.specs[name] for t, w in opened.items() if name in w.specs}
        excluded = next((p for p in exclude if fnmatchcase(name, p)), None)
        if excluded:
            skipped[name] = f"excluded by '{excluded}'"
        elif not spec.dtype.is_floating_point:
            skipped[name] = "integer tensor"
        elif not having:
            skipped[name] = "in no expert"
        elif not any(_may_change(w, opened_base, name) for w in opened.values()):
            skipped[name] = "changed by no adapter"
        elif _is_head(name, spec, having) or any(fnmatchcase(name, p) for p in heads):
            own.add(name)
            skipped[name] = "head, kept per task"
        else:
            merged[name] = spec
    problems = misfits(opened_base, opened, merged)
    raise_together([_at(where, f"experts.{task}", says) for task, says in problems], CheckpointError)
    if not merged:
        raise CheckpointError(_nothing_in_common(opened_base, opened, exclude))
    per_task = {
        task: _renamed(weights, [n for n in weights if n in own or n not in opened_base.specs])
        for task, weights in opened.items()
    }
    deltas = _Deltas(opened_base, list(opened.items()), merged)
    return TaskVectors(deltas, list(experts), opened_base, experts=opened, heads=per_task, skipped=skipped)


def _open_all(
    base: Source, experts: Mapping[str, Source], exclude: Sequence[str], where: Mapping[str, str], *, repeated: bool
) -> tuple[Weights, dict[str, Weights], dict[str, str]]:
    """Base and experts, under the base's names, and what is tied; whatever is wrong with any of them, together."""
    problems: list[str] = []
    opened: dict[str, Weights] = {}
    for key, source in {"base": base, **{f"experts.{task}": source for task, source in experts.items()}}.items():
        who = "the base" if key == "base" else f"expert '{key.removeprefix('experts.')}'"
        try:
            opened[key] = open_checkpoint(source)
            problems += [_at(where, key, says) for says in unfit(who, opened[key], exclude=exclude, base=key == "base")]
        except CheckpointError as e:
            problems.append(_at(where, key, f"{who}: {e}"))
    raise_together(problems, CheckpointError)
    if not repeated:
        # tensors and weights that are handed in open are the caller's own doing
        paths = {task: opened[f"experts.{task}"] for task, at in experts.items() if isinstance(at, str | Path)}
        found = repeats(opened["base"], paths)
        raise_together([_at(where, f"experts.{task}", says) for task, says in found], CheckpointError)
    aligned: dict[str, Weights] = {}
    once = without_doubles(opened["base"])
    for task in experts:
        try:
            aligned[task] = _aligned(without_doubles(opened[f"experts.{task}"], opened["base"]), once)
        except CheckpointError as e:
            problems.append(_at(where, f"experts.{task}", str(e)))
    raise_together(problems, CheckpointError)
    return once, aligned, tied_names(opened["base"])


def _at(where: Mapping[str, str], key: str, says: str) -> str:
    return f"{where[key]}: {says}" if key in where else says


def own_names(tvs: TaskVectors, task: str) -> dict[str, str]:
    """By name in the base, what one expert calls the tensor; tensors that it lacks or has a head for are left out.

    >>> tvs = task_vectors({"w": torch.zeros(2)}, {"a": {"bert.w": torch.ones(2), "head": torch.ones(1)}})
    >>> own_names(tvs, "a")
    {'w': 'bert.w'}
    """
    expert = tvs.experts[task]
    own = expert.names if isinstance(expert, _Renamed) else {n: n for n in expert}
    return {name: own[name] for name in tvs.base if name in own and own[name] not in tvs.heads.get(task, {})}


class Stacked(Computed):
    """What a function makes of stacks [T, ...]: rows are counted along the second dimension."""

    row_dim = 1


class _Rows(Weights):
    """Stacks [T, ...] that lie in files, read whole and then cut along the tensors' own first dimension."""

    row_dim = 1
    elementwise = False

    def __init__(self, stacks: Weights, specs: Mapping[str, Spec]) -> None:
        self._stacks, self.specs = stacks, specs
        self.inputs = (stacks,)

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        stack = self._stacks.read(name)
        return stack if rows == ALL else stack[:, rows]


class _Deltas(Weights):
    """[T, ...] float32 differences, read from T open checkpoints block by block."""

    row_dim = 1

    def __init__(self, base: Weights, experts: Sequence[tuple[str, Weights]], specs: Mapping[str, Spec]) -> None:
        self._base, self.experts, self.specs = base, experts, specs
        self.inputs = (base, *(w for _, w in experts))
        self.elementwise = base.elementwise and all(w.elementwise for _, w in experts)

    def only(self, index: Sequence[int]) -> "_Deltas":
        return _Deltas(self._base, [self.experts[i] for i in index], self.specs)

    def parts(self, name: str) -> Sequence[Node]:
        return self.inputs

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        memo = {} if memo is None else memo
        key = (id(self), name, rows.start, rows.stop)
        if key not in memo:
            base = self._base.read(name, rows, memo).float()  # the sum with the base reads it too
            tau = torch.empty(len(self.experts), *base.shape)
            for t, (_, expert) in enumerate(self.experts):
                if _on(expert, self._base):
                    tau[t] = expert.change(name, rows, base)
                else:
                    tau[t].copy_(expert.read(name, rows)).sub_(base)
            # NaN or infinity in base or expert is one in the difference, and one in the sum of all: the exact test
            # runs only where that, or overflow, shows
            if not finite(tau):
                _refuse_nonfinite("the base", name, base)
                for t, (task, expert) in enumerate(self.experts):
                    whole = tau[t] if _on(expert, self._base) else expert.read(name, rows)
                    _refuse_nonfinite(f"expert '{task}'", name, whole)
            memo[key] = tau
        return memo[key]


def _refuse_nonfinite(whose: str, name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"{whose}: tensor '{name}' has {bad} entries that are NaN or infinite. "
            f"A merge would spread them; use a sound checkpoint, or exclude the tensor (exclude: ['{name}'])."
        )


def _is_head(name: str, spec: Spec, having: Mapping[str, Spec]) -> bool:
    """Whether experts differ from the base, or from each other, in the number of classes alone."""
    shapes = {spec.shape, *(s.shape for s in having.values())}
    return (
        len(shapes) > 1
        and not is_vocabulary(name)
        and len({(len(s), s[1:]) for s in shapes}) == 1
        and all(len(s) > 0 for s in shapes)
    )


def _nothing_in_common(base: Weights, experts: Mapping[str, Weights], exclude: Sequence[str]) -> str:
    task, expert = next(iter(experts.items()))
    if len(base) and all(any(fnmatchcase(name, p) for p in exclude) for name in base):
        return f"nothing is left to merge: exclude ({', '.join(exclude)}) names every tensor of the base."
    return (
        "base and experts have no tensor in common that can be merged: the base has "
        f"'{next(iter(base), '(none)')}', expert '{task}' has '{next(iter(expert))}'. Are they of one architecture?"
    )


def _aligned(expert: Weights, base: Weights) -> Weights:
    """The expert under the base's names; an adapter, put on the base."""
    if isinstance(expert, Adapter):
        return adapted(base, expert, dtype=torch.float32)
    if _on(expert, base):
        return expert
    names = aligned_names(expert, base.specs)
    return expert if all(new == old for new, old in names.items()) else _Renamed(expert, names)


def _on(expert: Weights, base: Weights) -> TypeGuard[Adapted]:
    """Whether an expert is an adapter on this very base."""
    return isinstance(expert, Adapted) and expert.base is base


def _may_change(expert: Weights, base: Weights, name: str) -> bool:
    return not _on(expert, base) or name in expert.changed


def _renamed(weights: Weights, names: Sequence[str]) -> Weights:
    """Some tensors of an expert, under the expert's own names."""
    own = weights.names if isinstance(weights, _Renamed) else {n: n for n in weights}
    source = weights.source if isinstance(weights, _Renamed) else weights
    return _Renamed(source, {own[n]: own[n] for n in names})


class _Renamed(Weights):
    """Tensors of `source` under other names, some of them left out."""

    def __init__(self, source: Weights, names: Mapping[str, str]) -> None:
        self.source, self.names = source, dict(names)
        self.inputs = (source,)
        self.specs = {new: source.specs[old] for new, old in names.items()}
        self.elementwise = source.elementwise

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def whole(self, name: str) -> bool:
        return self.source.whole(self.names[name])

    def read(self, name: str, rows: slice = ALL, memo: Memo | None = None) -> Tensor:
        return self.source.read(self.names[name], rows, memo)


def _float32(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    return {name: Spec(spec.shape, torch.float32) for name, spec in specs.items()}


def materialise(weights: Weights) -> StateDict:
    """The weights computed and held in memory: one copy of all of them.

    >>> materialise(StateDict({"w": torch.ones(1)}).map(lambda w, site: w + 1))["w"]
    tensor([2.])
    """
    return StateDict({name: weights.read(name) for name in weights})
