"""What torch's operations are to a tape: by name, how a recorder takes each one down."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from calmerge import _machine as machine

if TYPE_CHECKING:
    from calmerge._recorder import Recorder


class Unrecordable(Exception):
    """Something that a tape cannot say."""


Rule = Callable[["Recorder", tuple[Any, ...], dict[str, Any], Tensor], None]
"""Takes an operation down: with its arguments, and the result that torch made."""
FLAGS = (torch.bool, torch.uint8)
"""Types in which booleans lie."""
RESERVED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
"""What reserves memory."""
FILLED: dict[str, Callable[[tuple[Any, ...]], float]] = {
    "zeros": lambda args: 0.0, "zeros_like": lambda args: 0.0, "new_zeros": lambda args: 0.0,
    "ones": lambda args: 1.0, "ones_like": lambda args: 1.0, "new_ones": lambda args: 1.0,
    "full": lambda args: float(args[1]), "full_like": lambda args: float(args[1]),
}  # fmt: skip
"""What reserves memory and fills it with a number: from the arguments to that number."""
VIEWS = {
    "view", "select", "slice", "unsqueeze", "squeeze", "detach", "alias", "_unsafe_view", "expand", "split", "unbind",
    "flatten", "reshape",
}  # fmt: skip
"""What gives the same memory."""


def _binary(op: int, *, swapped: bool = False) -> Rule:
    def rule(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        if kwargs.get("alpha", 1) != 1 or len(args) > 2 or kwargs.get("rounding_mode") is not None:
            raise Unrecordable("a scaled sum")
        x, y = args[:2]
        recorder.step(op, result, *((y, x) if swapped else (x, y)))

    return rule


def _unary(op: int) -> Rule:
    return lambda recorder, args, kwargs, result: recorder.step(op, result, args[0])


def _not(op: int) -> Rule:
    """1 less what `op` makes."""

    def rule(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        suffix = recorder.suffix(*args)
        recorder.put(result, recorder.over(machine.SUB, suffix, 1.0, recorder.over(op, suffix, *args[:2])))

    return rule


def _flags(op: int) -> Rule:
    """An operation of logic, between booleans."""

    def rule(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        if any(isinstance(x, Tensor) and x.dtype != torch.bool for x in args):
            raise Unrecordable("logic of numbers")
        recorder.step(op, result, *args)

    return rule


def _opposite(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    if args[0].dtype != torch.bool:
        raise Unrecordable("logic of numbers")
    recorder.step(machine.SUB, result, 1.0, args[0])


def _clamp(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    low = args[1] if len(args) > 1 else kwargs.get("min")
    high = args[2] if len(args) > 2 else kwargs.get("max")
    suffix = recorder.suffix(args[0], low, high)
    found = recorder.planes(args[0], suffix)
    if low is not None:
        found = recorder.over(machine.MOST, suffix, low, found)
    if high is not None:
        found = recorder.over(machine.LEAST, suffix, high, found)
    recorder.put(result, found)


def _power(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    if len(args) > 1 and args[1] != 2:
        raise Unrecordable("a power other than 2")
    recorder.step(machine.MUL, result, args[0], args[0])


def _where(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    recorder.step(machine.WHERE, result, *args)


def _masked_fill(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    recorder.step(machine.WHERE, result, args[1], args[2], args[0])


def _copied(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """Values in another place, and perhaps of another type."""
    source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
    suffix = recorder.suffix(source)
    planes = recorder.planes(source, suffix)
    before, after = source.dtype, result.dtype
    exact = before == after or (before in (torch.bfloat16, *FLAGS) and after == torch.float32)
    if before == torch.float32 and after == torch.bfloat16:
        planes = recorder.over(machine.ROUND_BF16, suffix, planes)
    elif before == torch.float32 and after in (torch.float16, torch.float64):
        recorder.put(result, planes, late=True)
        return
    elif not exact and (before, after) != (torch.bool, torch.uint8):
        raise Unrecordable(f"{before} to {after}")
    if any(int(v) in recorder.unrounded for v in planes.flat):
        raise Unrecordable("arithmetic after rounding")
    wanted = result.shape[: result.dim() - suffix]
    recorder.put(result, np.broadcast_to(planes, wanted) if planes.shape != wanted else planes)


def _joined(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    """`stack` and `cat` along the first dimension."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if dim != 0:
        raise Unrecordable("joined along another dimension")
    suffix = recorder.suffix(*args[0])
    recorder.put(result, np.concatenate([recorder.planes(x, suffix).reshape(-1) for x in args[0]]))


def _extreme(op: int) -> Rule:
    """The largest or smallest over the first dimension, that of tasks."""

    def rule(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
        x, dims = args[0], list(args[1]) if len(args) > 1 else []
        planes = recorder.planes(x, recorder.suffix(x))
        if dims not in ([0], [-x.dim()]) or len(args) > 2 or planes.ndim != 1:
            raise Unrecordable("an extreme over entries")
        found = planes[:1]
        for i in range(1, len(planes)):
            found = recorder.over(op, 0, found, planes[i : i + 1])
        recorder.put(result, found)

    return rule


def _filled(recorder: "Recorder", args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    recorder.reserve(result, float(args[1]) if len(args) > 1 else 0.0)


RULES: dict[str, Rule] = {
    "add": _binary(machine.ADD), "sub": _binary(machine.SUB), "rsub": _binary(machine.SUB, swapped=True),
    "mul": _binary(machine.MUL), "div": _binary(machine.DIV),
    "maximum": _binary(machine.MOST), "minimum": _binary(machine.LEAST),
    "gt": _binary(machine.GREATER), "lt": _binary(machine.GREATER, swapped=True),
    "ge": _binary(machine.AT_LEAST), "le": _binary(machine.AT_LEAST, swapped=True),
    "bitwise_and": _flags(machine.MUL), "bitwise_or": _flags(machine.MOST),
    "logical_and": _flags(machine.MUL), "logical_or": _flags(machine.MOST),
    "bitwise_not": _opposite, "logical_not": _opposite,
    "eq": _binary(machine.EQUAL), "ne": _not(machine.EQUAL),
    "abs": _unary(machine.ABS), "sign": _unary(machine.SIGN), "sqrt": _unary(machine.SQRT),
    "neg": lambda recorder, args, kwargs, result: recorder.step(machine.MUL, result, args[0], -1.0),
    "reciprocal": lambda recorder, args, kwargs, result: recorder.step(machine.DIV, result, 1.0, args[0]),
    "square": _power, "pow": _power,
    "hardshrink": lambda recorder, args, kwargs, result: recorder.step(
        machine.SHRINK, result, args[0], args[1] if len(args) > 1 else 0.5
    ),
    "clamp": _clamp, "clamp_min": _clamp,
    "where": _where, "masked_fill": _masked_fill,
    "copy": _copied, "_to_copy": _copied, "clone": _copied,
    "stack": _joined, "cat": _joined, "amax": _extreme(machine.MOST), "amin": _extreme(machine.LEAST),
    "fill": _filled, "zero": _filled,
}  # fmt: skip
"""All others that a tape can say."""
