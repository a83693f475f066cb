"""Turns PTX into the machine's program: numbered registers, constants, resolved labels.

An instruction becomes one operation or a few. What is not known raises :class:`UnsupportedPtx`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.triton.emulator.flow import joins
from tests.triton.emulator.isa import (
    DIRECT,
    FLOAT16,
    PAIRED,
    PARAMETER_BASE,
    SHARED_BASE,
    SPECIAL,
    SPECIALS,
    bits_of_type,
)
from tests.triton.emulator.parse import Function, Line, parse, split_operands

ROOM = {32: "u32", 64: "u64", 1: "p"}
_NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")
_MEMORY = re.compile(
    r"(ld|st)(\.volatile|\.relaxed\.gpu)?\.(global|shared)((?:\.(?:ca|cg|cs|cv|wb|wt|nc|lu|cta|L1::\w+|L2::\w+|shared::cta))*)"
    r"(\.v[24])?\.(\w+)$"
)
_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared\.global(\.L2::\w+)*$")
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32$")
_MATRIX = re.compile(r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16$")
_ATOMIC = re.compile(r"atom\.global(\.gpu)?\.acq_rel\.add\.[us]32$")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2$")


class UnsupportedPtx(ValueError):
    """An instruction or operand that the machine does not have."""


class Ref(NamedTuple):
    """A register by file (``u32``, ``u64`` or ``p``) and name, numbered when all are known."""

    file: str
    name: object


class Op(NamedTuple):
    """One operation: its name, operands, and the guard as predicate and negation."""

    name: str
    args: tuple[object, ...]
    guard: Ref | None
    negated: bool
    line: Line


@dataclass
class Code:
    """A kernel, lowered.

    Attributes:
        instructions: ``(operation, guard or -1, negated, first operand)`` each; ``operands``: of all.
        lines: where each comes from.
        constants: bits of the constants of 32 and 64 bits; ``parameters``: which of them a launch fills.
        places: offset and bytes of each parameter.
        names: of the registers, for messages.
        grain: log2 of the bytes of the smallest access to shared memory.
    """

    instructions: list[tuple[int, int, int, int]]
    operands: list[int]
    lines: list[Line]
    entry: int
    sizes: dict[str, int]
    constants: dict[str, list[int]]
    parameters: list[tuple[str, int] | None]
    places: list[tuple[int, int]]
    names: dict[tuple[str, int], str]
    grain: int


@dataclass
class _Builder:
    kinds: dict[str, tuple[str, ...]]
    ops: list[Op] = field(default_factory=list)
    smallest: int = 4
    constants: dict[Ref, int] = field(default_factory=dict)
    function: Function = field(default_factory=lambda: Function("", False, []))
    functions: dict[str, Function] = field(default_factory=dict)
    line: Line = field(default_factory=lambda: Line("", (), "", False, 0, ""))
    meet: int = -1

    def emit(self, name: str, *args: object) -> None:
        guard = self.register(self.line.guard, "p") if self.line.guard else None
        self.ops.append(Op(name, args, guard, self.line.negated, self.line))

    def refuse(self, why: str) -> UnsupportedPtx:
        text = f"{self.line.opcode} {', '.join(self.line.operands)}"
        return UnsupportedPtx(f"line {self.line.number} ({self.line.source}): {text}: {why}")

    # operands

    def register(self, text: str, file: str) -> Ref:
        kind = self.function.type_of(text)
        if kind is None:
            raise self.refuse(f"{text} is not declared")
        bits = bits_of_type(kind)
        if ROOM[max(32, bits) if bits > 1 else 1] != file:
            raise self.refuse(f"{text} is {kind}, the operand must be {file}")
        return Ref(file, (self.function.name, text))

    def constant(self, bits: int, file: str) -> Ref:
        ref = Ref(file, ("constant", bits & (0xFFFFFFFF if file == "u32" else 0xFFFFFFFFFFFFFFFF)))
        self.constants[ref] = ref.name[1]  # type: ignore[index]
        return ref

    def value(self, text: str, file: str, narrow: bool = False) -> Ref:
        """A source: register, special register, number or address of shared memory."""
        if file == "p":
            return self.register(text, file)
        if text in SPECIAL and file == "u32":
            return Ref("u32", ("special", text))
        if text.startswith("global_smem"):
            return self.constant(SHARED_BASE + int(text.partition("+")[2] or 0), file)
        if self.function.is_entry and file == "u64" and text in dict(self.function.parameters):
            return self.constant(PARAMETER_BASE + offsets(self.function)[text][0], file)
        if match := _FLOAT.match(text):
            return self.constant(int(match[1] or match[2], 16), file)
        if _NUMBER.match(text):
            number = int(text.rstrip("U"), 0)
            return self.constant(number & 0xFFFF if narrow else number, file)
        return self.register(text, file)

    def address(self, text: str, file: str) -> tuple[Ref, int]:
        """``[register + offset]`` or ``[global_smem+offset]``."""
        base, *rest = (part.strip() for part in re.split(r"\+", text.strip("[] ")))
        if len(rest) > 1 or (rest and not _NUMBER.match(rest[0])):
            raise self.refuse(f"cannot read the address {text}")
        offset = int(rest[0], 0) if rest else 0
        return self.value(base, file), offset

    def vector(self, text: str) -> list[str]:
        return list(split_operands(text.strip()[1:-1])) if text.startswith("{") else [text]

    # instructions

    def lower(self) -> None:
        opcode, operands = self.line.opcode, self.line.operands
        for pattern, method in _PATTERNS:
            if match := pattern.match(opcode):
                method(self, match, operands)
                return
        if opcode not in DIRECT or DIRECT[opcode] not in self.kinds:
            raise self.refuse("the emulator does not have this instruction")
        self.direct(DIRECT[opcode], opcode, operands)

    def direct(self, name: str, opcode: str, operands: tuple[str, ...]) -> None:
        kinds = self.kinds[name]
        if len(kinds) != len(operands):
            raise self.refuse(f"{len(operands)} operands instead of {len(kinds)}")
        files = [kind.replace("f", "u") for kind in kinds]
        narrow = opcode.endswith("16")
        target = self.register(operands[0], files[0])
        if opcode.startswith("cvt."):
            self.emit(
                name,
                target,
                *(self.narrowed(text, file) for text, file in zip(operands[1:], files[1:], strict=True)),
            )
            return
        values = (self.value(text, file, narrow) for text, file in zip(operands[1:], files[1:], strict=True))
        self.emit(name, target, *values)

    def narrowed(self, text: str, file: str, narrow: bool = False) -> Ref:
        """The source of a conversion or a store, which may be in a wider register than its type."""
        if file == "u32" and self.function.type_of(text) in ("b64", "s64", "u64"):
            low = Ref("u32", (self.function.name, "low", text))
            self.emit("low32", low, self.register(text, "u64"))
            return low
        return self.value(text, file, narrow)

    def move(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        """Pairs of registers in and out of a wider one, or a plain move, which may copy what nobody wrote."""
        target, source = operands
        bits = bits_of_type(match[1])
        if target.startswith("{"):
            parts = [
                bits_of_type(self.function.type_of(name) or "b32")
                for name in self.vector(target)
                if name != "_"
            ]
            low, high = ("low16", "high16") if parts[0] == 16 else ("low32", "high32")
            for name, part in zip((low, high), self.vector(target), strict=True):
                if part != "_":
                    self.emit(name, self.register(part, "u32"), self.value(source, ROOM[bits]))
        elif source.startswith("{"):
            parts_in = [self.value(part, "u32", bits == 32) for part in self.vector(source)]
            self.emit("pack16" if bits == 32 else "pack32", self.register(target, ROOM[bits]), *parts_in)
        elif bits == 1:
            if _NUMBER.match(source):
                self.emit("false_p" if int(source, 0) == 0 else "true_p", self.register(target, "p"))
            else:
                self.emit("mov_p", self.register(target, "p"), self.register(source, "p"))
        else:
            file = ROOM[max(bits, 32)]
            self.emit(
                f"mov{max(bits, 32)}", self.register(target, file), self.value(source, file, bits == 16)
            )

    def parameter(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        bits = bits_of_type(match[2])
        file = ROOM[max(32, bits)]
        memory, register = operands if match[1] == "st" else operands[::-1]
        name = memory.strip("[] ")
        if self.function.type_of(name.partition("+")[0]):  # an address in a register
            self.load("global", match[2], memory, [register])
            return
        if self.function.is_entry and match[1] == "ld" and name in dict(self.function.parameters):
            place = [known for known, _ in self.function.parameters].index(name)
            slot = Ref(file, ("kernel parameter", place))
            self.constants[slot] = 0
        else:
            slot = Ref(file, (self.function.name, "parameter", name))
        if match[1] == "st":
            self.emit(f"mov{max(32, bits)}", slot, self.narrowed(register, file, bits == 16))
        else:
            self.widened(register, match[2], lambda to: self.emit(f"mov{max(32, bits)}", to, slot))

    def call(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        """Parameters are registers of the callee: nothing here calls itself."""
        returned = self.vector("{" + operands[0][1:-1] + "}") if operands[0].startswith("(") else []
        name, arguments = operands[1 if returned else 0], operands[-1]
        if name not in self.functions:
            raise self.refuse("no such function")
        callee = self.functions[name]
        passed = list(split_operands(arguments[1:-1])) if arguments.startswith("(") else []
        pairs = list(zip([*passed, *returned], callee.parameters, strict=True))
        for argument, (parameter, kind) in pairs[: len(passed)]:
            file = ROOM[max(32, bits_of_type(kind))]
            mine, theirs = (self.function.name, "parameter", argument), (name, "parameter", parameter)
            self.emit(f"mov{file[1:]}", Ref(file, theirs), Ref(file, mine))
        self.emit("call", ("function", name))
        for argument, (parameter, kind) in pairs[len(passed) :]:
            file = ROOM[max(32, bits_of_type(kind))]
            mine, theirs = (self.function.name, "parameter", argument), (name, "parameter", parameter)
            self.emit(f"mov{file[1:]}", Ref(file, mine), Ref(file, theirs))

    def memory(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        load, space, kind = match[1] == "ld", match[3], match[6]
        memory, values = operands if not load else operands[::-1]
        nbytes, names = bits_of_type(kind) // 8, self.vector(values)
        if space == "shared":
            self.smallest = min(self.smallest, nbytes * len(names))
        if load:
            self.load(space, kind, memory, names)
            return
        base, offset = self.address(memory, "u64" if space == "global" else "u32")
        registers = [self.narrowed(name, "u64" if nbytes == 8 else "u32", nbytes == 2) for name in names]
        self.emit(f"store_{space}", nbytes, len(names), base, offset, *registers)

    def load(self, space: str, kind: str, memory: str, names: list[str]) -> None:
        nbytes = bits_of_type(kind) // 8
        base, offset = self.address(memory, "u64" if space == "global" else "u32")
        if len(names) > 1:
            registers = [self.register(name, "u64" if nbytes == 8 else "u32") for name in names]
            self.emit(f"load_{space}", nbytes, len(names), base, offset, *registers)
        else:
            self.widened(names[0], kind, lambda to: self.emit(f"load_{space}", nbytes, 1, base, offset, to))

    def widened(self, name: str, kind: str, fill: Callable[[Ref], None]) -> None:
        """Fill a register with a value of this type; in a wider one the sign goes on."""
        wide, narrow = bits_of_type(self.function.type_of(name) or "b32"), bits_of_type(kind)
        if max(wide, 32) > max(narrow, 32):
            low = Ref("u32", (self.function.name, "low", name))
            fill(low)
            self.emit("sext64" if kind.startswith("s") else "zext64", self.register(name, "u64"), low)
        else:
            target = self.register(name, ROOM[max(narrow, 32)])
            fill(target)
            if kind in ("s8", "s16"):
                self.emit(
                    {"s8": "signed8", "s16": "signed16"}[kind] + ("_16" if wide == 16 else ""), target, target
                )

    def copy(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        target, source, size, *taken = operands
        nbytes = int(size, 0)
        self.smallest = min(self.smallest, nbytes)
        used = self.value(taken[0], "u32") if taken else -1
        self.emit("copy_async", *self.address(target, "u32"), *self.address(source, "u64"), nbytes, used)

    def matrix(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        memory, values = operands if match[1] == "stmatrix" else operands[::-1]
        base, offset = self.address(memory, "u32")
        registers = [self.register(name, "u32") for name in self.vector(values)]
        self.emit(match[1], int(match[2]), int(bool(match[3])), base, offset, *registers)

    def mma(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        result, left, right, added = (
            [self.value(name, "u32") for name in self.vector(text)] for text in operands
        )
        self.emit("mma", int(match[1] == "f16"), *result, *left, *right, *added)

    def atomic(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        target, memory, value = operands
        base, offset = self.address(memory, "u64")
        self.emit("add_global", self.register(target, "u32"), base, offset, self.value(value, "u32"))

    def shuffle(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        target, *sources = operands
        target, _, inside = target.partition("|")
        mode = ("idx", "up", "down", "bfly").index(match[1])
        predicate = self.register(inside, "p") if inside else -1
        values = [self.value(text, "u32") for text in sources]
        self.emit("shuffle", mode, self.register(target, "u32"), predicate, *values)

    def redux(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        number = _REDUX.index(match[1])
        target, *sources = operands
        self.emit(
            "redux", number, self.register(target, "u32"), *(self.value(text, "u32") for text in sources)
        )

    def barrier(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        if len(operands) != 1 or not _NUMBER.match(operands[0]):
            raise self.refuse("only barriers of all threads are known")
        self.emit("barrier", int(operands[0], 0))

    def wait(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        self.emit("wait_copies", int(operands[0], 0) if operands else -1)

    def branch(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        meet: object = ("line", self.function.name, self.meet) if self.meet >= 0 else -1
        self.emit("branch", ("line", self.function.name, self.function.labels[operands[0]]), meet)

    def paired(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        """Sums and products of 16-bit floats."""
        kind = match[3]
        a, b = (self.value(text, "u32") for text in operands[1:])
        named = {"a": a, "b": b}
        values = [
            named[x] if isinstance(x, str) else self.constant(_pair(x, kind), "u32")
            for x in FLOAT16[match[1]]
        ]
        self.emit(f"fma_{kind}", self.register(operands[0], "u32"), *values)

    def wgmma(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        """Left operand in registers, or in shared memory like the right one."""
        result, left, right, add, *scales = operands
        in_shared = not left.startswith("{")
        if scales[:2] != ["1", "1"]:
            raise self.refuse("negated operands are not known")
        majors = [int(text) for text in scales[2:]]
        if _NUMBER.match(add):
            when: object = -2 if int(add, 0) == 0 else -1
        else:
            when = self.register(add, "p")
        first = (
            [self.value(left, "u64"), majors[0]]
            if in_shared
            else [self.register(r, "u32") for r in self.vector(left)]
        )
        self.smallest = min(self.smallest, 4)
        self.emit(
            "wgmma", int(match[2] == "f16"), int(match[1]), when, self.value(right, "u64"), majors[-1],
            int(in_shared), *first, *(self.register(name, "u32") for name in self.vector(result)),
        )  # fmt: skip

    def plain(self, match: re.Match[str], operands: tuple[str, ...]) -> None:
        self.emit(_PLAIN[match[0]], *(int(text, 0) for text in operands))


def _pair(value: float, kind: str) -> int:
    """A value in one or both halves of a register."""
    if kind.startswith("bf16"):
        bits = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    else:
        bits = struct.unpack("<H", struct.pack("<e", value))[0]
    return bits * 0x10001 if kind.endswith("x2") else bits


def offsets(function: Function) -> dict[str, tuple[int, int]]:
    """Where each parameter of a kernel lies and how many bytes it has."""
    found, at = {}, 0
    for name, kind in function.parameters:
        nbytes = bits_of_type(kind) // 8
        at = -(-at // nbytes) * nbytes
        found[name] = (at, nbytes)
        at += nbytes
    return found


_REDUX = ["add.s32", "and.b32", "or.b32", "xor.b32", "min.s32", "min.u32", "max.s32", "max.u32"]
_PLAIN = {
    "ret": "ret", "trap": "trap", "cp.async.commit_group": "commit_copies", "wgmma.fence.sync.aligned": "wgmma_fence",
    "wgmma.commit_group.sync.aligned": "wgmma_commit", "wgmma.wait_group.sync.aligned": "wgmma_wait",
    "fence.proxy.async.shared::cta": "proxy_fence", "fence.proxy.async": "proxy_fence",
}  # fmt: skip
"""Instructions whose operands are numbers, if any."""

_Method = Callable[[_Builder, re.Match[str], tuple[str, ...]], None]
_PATTERNS: list[tuple[re.Pattern[str], _Method]] = [
    (re.compile(r"mov\.(\w+)$"), _Builder.move),
    (re.compile(r"(ld|st)\.param\.(\w+)$"), _Builder.parameter),
    (re.compile(r"call(\.uni)?$"), _Builder.call),
    (_MEMORY, _Builder.memory),
    (_COPY, _Builder.copy),
    (_MATRIX, _Builder.matrix),
    (_MMA, _Builder.mma),
    (_WGMMA, _Builder.wgmma),
    (_ATOMIC, _Builder.atomic),
    (re.compile(r"shfl\.sync\.(idx|up|down|bfly)\.b32$"), _Builder.shuffle),
    (re.compile(r"redux\.sync\.([\w.]+)$"), _Builder.redux),
    (re.compile(r"(?:bar|barrier\.cta)\.sync(?:\.aligned)?$"), _Builder.barrier),
    (re.compile(r"cp\.async\.wait_(?:group|all)$"), _Builder.wait),
    (re.compile(r"bra(\.uni)?$"), _Builder.branch),
    (PAIRED, _Builder.paired),
    (re.compile("|".join(re.escape(name) + "$" for name in _PLAIN)), _Builder.plain),
    (re.compile(r"bar\.warp\.sync$"), lambda builder, match, operands: builder.emit("warp_barrier")),
]


def lower(text: str, operations: list[str]) -> Code:
    """The program of the one kernel in a PTX module.

    Args:
        operations: ``name types`` of the machine's operations in order.
    """
    numbers = {what.split()[0]: number for number, what in enumerate(operations)}
    kinds = {what.split()[0]: tuple(what.split()[1:]) for what in operations}
    functions = parse(text)
    builder = _Builder(kinds, functions=functions)
    starts: dict[object, int] = {}
    for function in functions.values():
        builder.function = function
        meeting = joins(function)
        starts["function", function.name] = len(builder.ops)
        for index, line in enumerate(function.lines):
            starts["line", function.name, index] = len(builder.ops)
            builder.line, builder.meet = line, meeting.get(index, -1)
            builder.lower()
        starts["line", function.name, len(function.lines)] = len(builder.ops)
        builder.line = Line("trap", (), "", False, builder.line.number, builder.line.source)
        builder.emit("trap")
    entry = next(function for function in functions.values() if function.is_entry)
    return _numbered(builder, numbers, starts, entry)


def _numbered(builder: _Builder, numbers: dict[str, int], starts: dict[object, int], entry: Function) -> Code:
    places: dict[Ref, int] = {}
    constants: dict[str, list[int]] = {"u32": [], "u64": []}
    first = {"u32": SPECIALS, "u64": 0, "p": 0}
    parameters: list[tuple[str, int] | None] = [None] * len(entry.parameters)
    for ref, bits in builder.constants.items():
        places[ref] = first[ref.file] + len(constants[ref.file])
        if ref.name[0] == "kernel parameter":  # type: ignore[index]
            parameters[ref.name[1]] = (ref.file, len(constants[ref.file]))  # type: ignore[index]
        constants[ref.file].append(bits)
    sizes = {file: first[file] + len(constants.get(file, ())) for file in first}

    def number(arg: object) -> int:
        if isinstance(arg, int):
            return arg
        if not isinstance(arg, Ref):
            return starts[arg]
        if arg.name[0] == "special":  # type: ignore[index]
            return SPECIAL[arg.name[1]]  # type: ignore[index]
        if arg not in places:
            places[arg] = sizes[arg.file]
            sizes[arg.file] += 1
        return places[arg]

    instructions, operands = [], []
    for op in builder.ops:
        guard = -1 if op.guard is None else number(op.guard)
        instructions.append((numbers[op.name], guard, int(op.negated), len(operands)))
        operands += [number(arg) for arg in op.args]
    names = {(ref.file, place): str(ref.name[-1]) for ref, place in places.items()}  # type: ignore[index]
    return Code(
        instructions, operands, [op.line for op in builder.ops], starts["function", entry.name], sizes, constants,
        parameters, list(offsets(entry).values()), names, builder.smallest.bit_length() - 1,
    )  # fmt: skip
