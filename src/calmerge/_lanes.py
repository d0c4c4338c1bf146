"""Sixteen entries at a time, for what a compiler does not find by itself: to put those that are wanted side by side.

Where a processor has an instruction for it (AVX-512) that takes a fifth of the time of one entry after the other.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_LANE = ir.IntType(32)
_VECTOR = ir.VectorType(_LANE, LANES)
_COMPRESS = f"llvm.experimental.vector.compress.v{LANES}i32"
_UNDEFINED = ir.Constant(_VECTOR, ir.Undefined)


def _place(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    """The address of sixteen entries of an array from an index on."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _everywhere(builder: Any, number: Any) -> Any:
    first = builder.insert_element(_UNDEFINED, number, _LANE(0))
    return builder.shuffle_vector(first, _UNDEFINED, ir.Constant(_VECTOR, [0] * LANES))


@intrinsic  # type: ignore[untyped-decorator]
def flagged(context: Any, bits: Any, at: Any, low: Any, high: Any) -> Any:
    """How many of sixteen magnitudes lie below `low`, how many from there up to `high`, and which, as bits.

    Args:
        bits: int32 [n], those of floats.
        at: the place of the first, at most n - 16.
        low: int32, bits of a magnitude.
        high: int32, bits of another.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def mask(flags: Any) -> Any:
            return builder.bitcast(flags, ir.IntType(LANES))

        found = builder.load(_place(context, builder, signature.args[0], args[0], args[1]), align=4)
        magnitudes = builder.and_(found, ir.Constant(_VECTOR, [0x7FFFFFFF] * LANES))
        below = builder.icmp_signed("<", magnitudes, _everywhere(builder, args[2]))
        upto = builder.icmp_signed("<=", magnitudes, _everywhere(builder, args[3]))
        inside = mask(builder.and_(upto, builder.not_(below)))
        counts = [builder.zext(builder.ctpop(flags), ir.IntType(64)) for flags in (mask(below), inside)]
        return context.make_tuple(builder, signature.return_type, [*counts, builder.zext(inside, ir.IntType(64))])

    return types.UniTuple(types.int64, 3)(bits, types.int64, types.int32, types.int32), code


@intrinsic  # type: ignore[untyped-decorator]
def packed(context: Any, bits: Any, at: Any, which: Any, kept: Any, into: Any, to: Any) -> Any:
    """Put those of sixteen entries that are wanted side by side; what comes behind them, up to sixteen, is overwritten.

    Args:
        bits: int32 [n].
        at: the place of the first, at most n - 16.
        which: those that are wanted, as bits.
        kept: int32, the bits of each that stay.
        into: int32.
        to: the place of the first that is put there, at most the array's length - 16.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = builder.load(_place(context, builder, signature.args[0], args[0], args[1]), align=4)
        found = builder.and_(found, _everywhere(builder, args[3]))
        flags = builder.bitcast(builder.trunc(args[2], ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
        kind = ir.FunctionType(_VECTOR, [_VECTOR, flags.type, _VECTOR])
        compress = cgutils.get_or_insert_function(builder.module, kind, _COMPRESS)
        place = _place(context, builder, signature.args[4], args[4], args[5])
        builder.store(builder.call(compress, [found, flags, _UNDEFINED]), place, align=4)
        return context.get_dummy_value()

    return types.void(bits, types.int64, types.int64, types.int32, into, types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def played(context: Any, tape: Any, begin: Any, end: Any) -> Any:
    """What a `Player` returns that is called for some entries.

    Args:
        tape: its address, those of inputs, outputs and constants, and of files and the first bytes in them; int64.
        begin: the first entry.
        end: behind the last one.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, *tables = cgutils.unpack_tuple(builder, args[0])[:6]
        word = ir.IntType(64)
        function = builder.inttoptr(address, ir.FunctionType(ir.IntType(32), [word] * 7).as_pointer())
        return builder.call(function, [*tables[:3], args[1], args[2], *tables[3:]])

    return types.int32(tape, types.int64, types.int64), code
