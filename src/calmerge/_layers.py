"""Where a tensor stands in the depth of a model, found from the names of all its tensors."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """The block that a tensor belongs to: block `index`, from 0, of the `count` blocks of a `stack`."""

    stack: str
    index: int
    count: int


def layers(names: Iterable[str], *, stacks: Literal["separate", "concat"] = "separate") -> dict[str, Layer]:
    """The block of every tensor that is inside one; embeddings, final norms and heads are inside none.

    A stack is a module whose children are called 0 to L - 1, one and all, and are blocks: they have a tensor of the
    same name, in a module of its own (`norm.weight`, not `weight`, as a row of linear layers would have). Of nested
    stacks the outermost counts, so that `encoder.block.3.layer.0.q.weight` is in block 3, and an expert of a mixture in
    the block around it. A number at the very start of a name is a wrapper's, not a block's.

    Args:
        names: of all tensors of the model (of its base: without some of them, a stack may have gaps).
        stacks: every stack counts for itself (`separate`), or a decoder goes on where the encoder of the same name
            ends (`concat`).

    >>> found = layers(["embed.weight", "h.0.ln.weight", "h.1.ln.weight", "h.1.mlp.0.weight"])
    >>> found["h.1.mlp.0.weight"]
    Layer(stack='h', index=1, count=2)
    >>> "embed.weight" in found
    False
    """
    names = list(names)
    blocks: dict[str, dict[int, set[str]]] = {}
    for name in names:
        for stack, index, inside in _candidates(name):
            block = blocks.setdefault(stack, {}).setdefault(index, set())
            if "." in inside:
                block.add(inside)
    counts = {stack: len(found) for stack, found in blocks.items() if _is_stack(found)}
    before = dict.fromkeys(counts, 0)
    total = dict(counts)
    if stacks == "concat":
        for decoder in counts:
            encoder = ".".join("encoder" if part == "decoder" else part for part in decoder.split("."))
            if encoder != decoder and encoder in counts:
                before[decoder] = counts[encoder]
                total[encoder] = total[decoder] = counts[encoder] + counts[decoder]
    found = {}
    for name in names:
        at = next(((stack, index) for stack, index, _ in _candidates(name) if stack in counts), None)
        if at:
            stack, index = at
            found[name] = Layer(stack, before[stack] + index, total[stack])
    return found


def _candidates(name: str) -> Iterator[tuple[str, int, str]]:
    """Every number among the parts of a name, from the outside: what stands before it, itself, and the rest."""
    parts = name.split(".")
    for i, part in enumerate(parts[1:], 1):
        if part.isdecimal() and str(int(part)) == part:
            yield ".".join(parts[:i]), int(part), ".".join(parts[i + 1 :])


def _is_stack(blocks: dict[int, set[str]]) -> bool:
    return sorted(blocks) == list(range(len(blocks))) and bool(set.intersection(*blocks.values()))
