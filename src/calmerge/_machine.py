"""The machine that plays tapes: all steps of one, compiled into a single loop over the entries of a block.

Entries stay in the processor's registers between two steps, what is read from files in its cache, and Python is not
asked again until a block is done, so that threads do not wait for each other. Every step is one operation of IEEE
single precision, as torch makes it, and none is fused with another: what comes out is the same to the bit.

The loop is written in LLVM's assembly language, which llvmlite (a part of numba) compiles.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite
import llvmlite.binding as llvm
import numba

from calmerge._objects import kept

F = TypeVar("F", bound=Callable[..., Any])

STRIP = 2**15
"""How many entries are read from files at a time."""
SOUND, NOT_FINITE, UNREADABLE = 0, 1, 2
_COMPILING = threading.Lock()

(
    LOAD_BF16, LOAD_F32, LOAD_U8, STORE_BF16, STORE_F32, FINITE, ADD, SUB, MUL, DIV, LEAST, MOST, ABS, SIGN, SQRT,
    SHRINK, GREATER, AT_LEAST, EQUAL, WHERE, ROUND_BF16,
) = range(21)  # fmt: skip


class Load(NamedTuple):
    """A value that is read: how, and the bytes of an entry if they lie in a file, else 0."""

    op: int
    stored: int


class Step(NamedTuple):
    """One operation: the value it makes, and those it is made from."""

    op: int
    to: int
    a: int = 0
    b: int = 0
    d: int = 0


def compiled() -> Callable[[F], F]:
    """A decorator that compiles to machine code which lets other threads run, when it is first called.

    It is kept on disk, where a place for it is found.
    """
    options = {"nogil": True, "error_model": "numpy", "boundscheck": False}

    def compile(fn: F) -> F:
        try:
            return numba.njit(cache=True, **options)(fn)  # type: ignore[no-any-return]
        except RuntimeError:  # no folder can be written to
            return numba.njit(**options)(fn)  # type: ignore[no-any-return]

    return compile


class Player:
    """A compiled tape, to be called with the addresses of its planes.

    Called as `player(inputs, outputs, constants, begin, end, files, firsts)`, all addresses of arrays but `begin` and
    `end`, the entries of a plane that are worked on: int64 addresses of the planes that are read (of those in files, of
    room for a strip) and of where what comes out is written, from the entry `begin` on; float32 constants; int64 open
    files and the first byte in each. It returns SOUND, or what was found of an entry that was asked to be finite and is
    not, or of a file that ends too early.

    Attributes:
        address: of the function, for compiled loops that play strip after strip.

    Args:
        loads: what the first values are; then come the constants, then what the steps make.
        constants: for each, whether it is known to be finite.
        steps: in order.
        stores: operation and value of each plane that is written.
    """

    def __init__(
        self, loads: Sequence[Load], constants: Sequence[bool], steps: Sequence[Step], stores: Sequence[tuple[int, int]]
    ) -> None:
        code = _code(_program(loads, constants, steps, stores))
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())  # owns the code
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self.address = self._engine.get_function_address("play")
        kind = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 2)
        self._play = kind(self.address)

    def __call__(self, *arguments: int) -> int:
        return int(self._play(*arguments))


def player(
    loads: tuple[Load, ...], constants: tuple[bool, ...], steps: tuple[Step, ...], stores: tuple[tuple[int, int], ...]
) -> Player:
    """The player of a tape; one for all tensors whose tapes differ in their constants alone."""
    with _COMPILING:  # who comes second finds it
        return _player(loads, constants, steps, stores)


_player = lru_cache(maxsize=256)(Player)


def _code(text: str) -> bytes:
    """A program as machine code of this processor."""

    def compile() -> bytes:
        module = llvm.parse_assembly(text)
        module.verify()
        builder = _passes()
        builder.getModulePassManager().run(module, builder)
        return bytes(_target().emit_object(module))

    target = _target()
    machine = (target.triple, llvm.get_host_cpu_name(), _features(), llvmlite.__version__, llvm.llvm_version_info)
    return kept(_folder(), repr((text, machine)), compile)


@cache
def _folder() -> Path | None:
    """Where numba keeps what it compiles of this module, if it found a place."""
    looked: Any = compiled()(lambda: None)
    return None if looked.stats.cache_path is None else Path(looked.stats.cache_path)


def _target() -> Any:
    """This processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=_features(), opt=3)


def _features() -> str:
    try:
        return str(llvm.get_host_cpu_features().flatten())
    except RuntimeError:  # not told on every system
        return ""


@cache
def _passes() -> Any:
    """What optimises for this processor."""
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = True
    return llvm.create_pass_builder(_target(), tuning)


# The program -------------------------------------------------------------------------------------------------------

_SIZES = {LOAD_BF16: 2, LOAD_F32: 4, LOAD_U8: 1, STORE_BF16: 2, STORE_F32: 4}
_ROUNDED = """\
{r}.u = bitcast float {a} to i32
{r}.h = lshr i32 {r}.u, 16
{r}.e = and i32 {r}.h, 1
{r}.s = add i32 {r}.e, 32767
{r}.t = add i32 {r}.u, {r}.s
"""  # to the nearest bfloat16, of two the even one
_STORED = "{r}.o = trunc i32 {r}.w to i16\nstore i16 {r}.o, ptr {at}"
_LEAST = "{r}.c = fcmp olt float {a}, {b}\n%s = select i1 {r}.c, float {a}, float {b}"
_MOST = "{r}.c = fcmp ogt float {a}, {b}\n%s = select i1 {r}.c, float {a}, float {b}"
_UNLESS_NAN = "\n{r}.n = fcmp uno float {a}, 0.0\n{r} = select i1 {r}.n, float {a}, float {r}.l"
_LINES = {
    LOAD_BF16: "{r}.x = load i16, ptr {at}\n{r}.z = zext i16 {r}.x to i32\n{r}.s = shl i32 {r}.z, 16\n"
    "{r} = bitcast i32 {r}.s to float",
    LOAD_F32: "{r} = load float, ptr {at}",
    LOAD_U8: "{r}.x = load i8, ptr {at}\n{r} = uitofp i8 {r}.x to float",
    STORE_BF16: _ROUNDED + "{r}.n = fcmp uno float {a}, 0.0\n{r}.k = lshr i32 {r}.t, 16\n"
    "{r}.w = select i1 {r}.n, i32 32704, i32 {r}.k\n" + _STORED,
    STORE_F32: "store float {a}, ptr {at}",
    FINITE: "{r}.u = bitcast float {a} to i32\n{r}.m = and i32 {r}.u, 2147483647\n"
    "{r} = call i32 @llvm.umax.i32(i32 {top}, i32 {r}.m)",
    ADD: "{r} = fadd float {a}, {b}", SUB: "{r} = fsub float {a}, {b}",
    MUL: "{r} = fmul float {a}, {b}", DIV: "{r} = fdiv float {a}, {b}",
    LEAST: _LEAST % "{r}.l" + _UNLESS_NAN, MOST: _MOST % "{r}.l" + _UNLESS_NAN,
    ABS: "{r} = call float @llvm.fabs.f32(float {a})", SQRT: "{r} = call float @llvm.sqrt.f32(float {a})",
    SIGN: "{r}.x = call float @llvm.copysign.f32(float 1.0, float {a})\n{r}.c = fcmp one float {a}, 0.0\n"
    "{r} = select i1 {r}.c, float {r}.x, float 0.0",
    SHRINK: "{r}.m = call float @llvm.fabs.f32(float {a})\n{r}.c = fcmp ugt float {r}.m, {b}\n"
    "{r} = select i1 {r}.c, float {a}, float 0.0",
    GREATER: "{r}.c = fcmp ogt float {a}, {b}\n{r} = select i1 {r}.c, float 1.0, float 0.0",
    AT_LEAST: "{r}.c = fcmp oge float {a}, {b}\n{r} = select i1 {r}.c, float 1.0, float 0.0",
    EQUAL: "{r}.c = fcmp oeq float {a}, {b}\n{r} = select i1 {r}.c, float 1.0, float 0.0",
    WHERE: "{r}.c = fcmp une float {a}, 0.0\n{r} = select i1 {r}.c, float {b}, float {d}",
    ROUND_BF16: _ROUNDED + "{r}.n = fcmp uno float {a}, 0.0\n{r}.k = and i32 {r}.t, -65536\n"
    "{r}.v = select i1 {r}.n, i32 2143289344, i32 {r}.k\n{r} = bitcast i32 {r}.v to float",
}  # fmt: skip
"""What a step is in assembly: {r} is the value it makes, {at} an address, {top} the largest bits asked for so far."""
_SURE = {
    LEAST: _LEAST % "{r}", MOST: _MOST % "{r}", STORE_BF16: _ROUNDED + "{r}.w = lshr i32 {r}.t, 16\n" + _STORED,
    ROUND_BF16: _ROUNDED + "{r}.k = and i32 {r}.t, -65536\n{r} = bitcast i32 {r}.k to float",
}  # fmt: skip
"""The same where {a} is a number for sure, and not NaN."""

_WIDE = '"prefer-vector-width"="512"'
"""Vectors as wide as the processor has: by itself LLVM halves those of AVX-512, in which steps take a third longer."""

_READING = """
declare i64 @pread(i32, ptr, i64, i64)
declare i32 @llvm.umax.i32(i32, i32)
declare i64 @llvm.umin.i64(i64, i64)
declare float @llvm.fabs.f32(float)
declare float @llvm.sqrt.f32(float)
declare float @llvm.copysign.f32(float, float)

define internal i1 @fill(i64 %handle, ptr %into, i64 %size, i64 %first) noinline {
entry:
  %file = trunc i64 %handle to i32
  br label %again
again:
  %done = phi i64 [0, %entry], [%now, %more]
  %left = sub i64 %size, %done
  %place = getelementptr i8, ptr %into, i64 %done
  %from = add i64 %first, %done
  %got = call i64 @pread(i32 %file, ptr %place, i64 %left, i64 %from)
  %any = icmp sgt i64 %got, 0
  br i1 %any, label %more, label %short
more:
  %now = add i64 %done, %got
  %whole = icmp uge i64 %now, %size
  br i1 %whole, label %full, label %again
full:
  ret i1 true
short:
  ret i1 false
}
"""


def _program(
    loads: Sequence[Load], constants: Sequence[bool], steps: Sequence[Step], stores: Sequence[tuple[int, int]]
) -> str:
    """`play`, which reads strip after strip, and `strip`, the loop over the entries of one."""
    sure = _sure(loads, constants, steps)
    return "\n".join([_READING, *_strip(loads, len(constants), steps, stores, sure), *_play(loads, constants, stores)])


def _sure(loads: Sequence[Load], constants: Sequence[bool], steps: Sequence[Step]) -> set[int]:
    """The values that are numbers for sure, and not NaN, wherever what was asked to be finite is."""
    first = len(loads)
    finite = {j for j, load in enumerate(loads) if load.op == LOAD_U8}
    finite |= {first + j for j, known in enumerate(constants) if known}
    finite |= {step.a for step in steps if step.op == FINITE}
    sure = set(finite)
    for step in steps:
        read = {step.a} if step.op in (ABS, SHRINK, ROUND_BF16) else {step.a, step.b}
        if step.op in (SIGN, GREATER, AT_LEAST, EQUAL) or (step.op in (ABS, SHRINK, LEAST, MOST) and read <= finite):
            finite.add(step.to)
        if step.to in finite or (step.op in (ADD, SUB, MUL) and read <= finite):  # infinite at most
            sure.add(step.to)
        if step.op in (ABS, SHRINK, LEAST, MOST, ROUND_BF16) and read <= sure:
            sure.add(step.to)
    return sure


def _strip(
    loads: Sequence[Load], constants: int, steps: Sequence[Step], stores: Sequence[tuple[int, int]], sure: set[int]
) -> list[str]:
    planes = [f"ptr noalias readonly %i{j}" for j in range(len(loads))]
    planes += [f"ptr noalias %o{j}" for j in range(len(stores))]
    planes += [f"float %v{len(loads) + j}" for j in range(constants)]
    body, top = [], "%top"

    def line(op: int, r: str, at: str = "", **values: int) -> None:
        names = {key: f"%v{value}" for key, value in values.items()}
        lines = _SURE if op in _SURE and values["a"] in sure else _LINES
        body.append(lines[op].format(r=r, at=at, top=top, **names))

    for j, load in enumerate(loads):
        body.append(f"%a{j} = getelementptr i{8 * _SIZES[load.op]}, ptr %i{j}, i64 %k")
        line(load.op, f"%v{j}", f"%a{j}")
    for j, step in enumerate(steps):
        if step.op == FINITE:
            line(step.op, f"%top{j}", a=step.a)
            top = f"%top{j}"
        else:
            line(step.op, f"%v{step.to}", a=step.a, b=step.b, d=step.d)
    for j, (op, value) in enumerate(stores):
        body.append(f"%b{j} = getelementptr i{8 * _SIZES[op]}, ptr %o{j}, i64 %k")
        line(op, f"%s{j}", f"%b{j}", a=value)
    return [
        f"define internal i32 @strip({', '.join(planes)}, i64 %n) noinline {_WIDE} {{", "entry:", "br label %loop",
        "loop:",
        "%k = phi i64 [0, %entry], [%next, %loop]", f"%top = phi i32 [0, %entry], [{top}, %loop]", *body,
        "%next = add nuw nsw i64 %k, 1", "%more = icmp ult i64 %next, %n", "br i1 %more, label %loop, label %end",
        "end:", f"ret i32 {top}", "}",
    ]  # fmt: skip


def _play(loads: Sequence[Load], constants: Sequence[bool], stores: Sequence[tuple[int, int]]) -> list[str]:
    files = [j for j, load in enumerate(loads) if load.stored]

    def taken(name: str, kind: str, array: str, count: int) -> list[str]:
        return [
            f"%{name}{j}.p = getelementptr {kind}, ptr %{array}, i64 {j}\n%{name}{j} = load {kind}, ptr %{name}{j}.p"
            for j in range(count)
        ]

    lines = [
        "define i32 @play(ptr %inputs, ptr %outputs, ptr %constants, i64 %start, i64 %n, ptr %files, ptr %firsts) {",
        "entry:",
        *taken("i", "ptr", "inputs", len(loads)), *taken("o", "ptr", "outputs", len(stores)),
        *taken("c", "float", "constants", len(constants)), *taken("f", "i64", "files", len(files)),
        *taken("g", "i64", "firsts", len(files)), "br label %outer", "outer:",
        f"%begin = phi i64 [%start, %entry], [%next, %read{len(files)}]",
        f"%bad = phi i32 [0, %entry], [%worst, %read{len(files)}]",
        "%left = sub i64 %n, %begin", f"%w = call i64 @llvm.umin.i64(i64 %left, i64 {STRIP})", "br label %read0",
    ]  # fmt: skip
    for f, j in enumerate(files):
        size = loads[j].stored
        lines += [
            f"read{f}:", f"%z{f} = mul i64 %w, {size}", f"%x{f} = mul i64 %begin, {size}",
            f"%y{f} = add i64 %g{f}, %x{f}", f"%ok{f} = call i1 @fill(i64 %f{f}, ptr %i{j}, i64 %z{f}, i64 %y{f})",
            f"br i1 %ok{f}, label %read{f + 1}, label %unreadable",
        ]  # fmt: skip
    lines += [f"read{len(files)}:", "%written = sub i64 %begin, %start"]
    pointers = []
    for j, load in enumerate(loads):
        if load.stored:
            pointers.append(f"ptr %i{j}")
        else:
            lines.append(f"%p{j} = getelementptr i{8 * _SIZES[load.op]}, ptr %i{j}, i64 %begin")
            pointers.append(f"ptr %p{j}")
    for j, (op, _) in enumerate(stores):
        lines.append(f"%q{j} = getelementptr i{8 * _SIZES[op]}, ptr %o{j}, i64 %written")
        pointers.append(f"ptr %q{j}")
    given = ", ".join([*pointers, *(f"float %c{j}" for j in range(len(constants))), "i64 %w"])
    return [
        *lines, f"%top = call i32 @strip({given})", "%worst = call i32 @llvm.umax.i32(i32 %bad, i32 %top)",
        "%next = add i64 %begin, %w", "%more = icmp ult i64 %next, %n", "br i1 %more, label %outer, label %end",
        "end:", "%sick = icmp uge i32 %worst, 2139095040", f"%found = select i1 %sick, i32 {NOT_FINITE}, i32 {SOUND}",
        "ret i32 %found", "unreadable:", f"ret i32 {UNREADABLE}", "}",
    ]  # fmt: skip
