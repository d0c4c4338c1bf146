"""Which module of a file of mergekit's a tensor belongs to, told by its name instead of a list of architectures."""

from collections.abc import Collection, Mapping, Sequence

from calmerge._errors import UsageError
from calmerge.mergekit.document import Module

PATHS: Mapping[str, Sequence[str]] = {
    "text_decoder": ("model", "lm_head", "language_model"), "vision_tower": ("visual", "vision_tower"),
    "multi_modal_projector": ("visual.merger", "visual.deepstack_merger_list", "multi_modal_projector"),
    "vision_model": ("vision_model",), "shared": ("shared", "lm_head"),
}  # fmt: skip
"""What modules of mergekit's architectures have in the names of their tensors, where that is not the module's own."""


def module_of(name: str, modules: Sequence[Module]) -> Module:
    """The module that a tensor belongs to, by the longest path that its name holds; one without a name if to none.

    >>> text, vision = (Module(name, (), {}, "c.yml:1") for name in ("text_decoder", "vision_tower"))
    >>> module_of("model.visual.blocks.0.norm1.weight", [text, vision]).name
    'vision_tower'
    >>> module_of("model.visual.merger.norm.weight", [text, vision]).name
    ''
    """
    if len(modules) == 1:
        return modules[0]
    known = {module.name: module for module in modules}
    rest = Module("", (), {}, modules[0].where)
    order = sorted(PATHS, key=lambda other: other in known)  # of two with the same path the one that is there counts
    for paths in (known, {path: known.get(other, rest) for other in order for path in PATHS[other]}):
        fitting = [path for path in paths if f".{path}." in f".{name}"]
        if fitting:
            return paths[max(fitting, key=len)]
    return rest


def check_modules(modules: Sequence[Module], found: Collection[str]) -> None:
    """Every module has a tensor.

    Raises:
        UsageError: one is not among those that were found.
    """
    for module in modules:
        if module.name not in found:
            raise UsageError(f"{module.where}: no tensor belongs to a module '{module.name}'.")
