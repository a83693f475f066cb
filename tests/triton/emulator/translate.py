"""Instructions of PTX as operations of the machine: one, or a few. What is not known raises ``UnsupportedPtx``."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from tests.triton.emulator.isa import DIRECT, FLOAT16, PAIRED, bits_of_type
from tests.triton.emulator.operands import NUMBER, ROOM, Builder, Ref
from tests.triton.emulator.parse import split_operands

_MEMORY = re.compile(
    r"(ld|st)(\.volatile|\.relaxed\.gpu)?\.(global|shared)((?:\.(?:ca|cg|cs|cv|wb|wt|nc|lu|cta|L1::\w+|L2::\w+|shared::cta))*)"
    r"(\.v[24])?\.(\w+)$"
)
_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared\.global(\.L2::\w+)*$")
_MMA = re.compile(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32$")
_MATRIX = re.compile(r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16$")
_ATOMIC = re.compile(r"atom\.global(\.gpu)?\.acq_rel\.add\.[us]32$")
_WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2$")


class Translator(Builder):
    """Methods take the match of the opcode and the operands as written."""

    def translate(self) -> None:
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
            if NUMBER.match(source):
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
        if len(operands) != 1 or not NUMBER.match(operands[0]):
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
        if NUMBER.match(add):
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


_REDUX = ["add.s32", "and.b32", "or.b32", "xor.b32", "min.s32", "min.u32", "max.s32", "max.u32"]
_PLAIN = {
    "ret": "ret", "trap": "trap", "cp.async.commit_group": "commit_copies", "wgmma.fence.sync.aligned": "wgmma_fence",
    "wgmma.commit_group.sync.aligned": "wgmma_commit", "wgmma.wait_group.sync.aligned": "wgmma_wait",
    "fence.proxy.async.shared::cta": "proxy_fence", "fence.proxy.async": "proxy_fence",
}  # fmt: skip
"""Instructions whose operands are numbers, if any."""

_Method = Callable[[Translator, re.Match[str], tuple[str, ...]], None]
_PATTERNS: list[tuple[re.Pattern[str], _Method]] = [
    (re.compile(r"mov\.(\w+)$"), Translator.move),
    (re.compile(r"(ld|st)\.param\.(\w+)$"), Translator.parameter),
    (re.compile(r"call(\.uni)?$"), Translator.call),
    (_MEMORY, Translator.memory),
    (_COPY, Translator.copy),
    (_MATRIX, Translator.matrix),
    (_MMA, Translator.mma),
    (_WGMMA, Translator.wgmma),
    (_ATOMIC, Translator.atomic),
    (re.compile(r"shfl\.sync\.(idx|up|down|bfly)\.b32$"), Translator.shuffle),
    (re.compile(r"redux\.sync\.([\w.]+)$"), Translator.redux),
    (re.compile(r"(?:bar|barrier\.cta)\.sync(?:\.aligned)?$"), Translator.barrier),
    (re.compile(r"cp\.async\.wait_(?:group|all)$"), Translator.wait),
    (re.compile(r"bra(\.uni)?$"), Translator.branch),
    (PAIRED, Translator.paired),
    (re.compile("|".join(re.escape(name) + "$" for name in _PLAIN)), Translator.plain),
    (re.compile(r"bar\.warp\.sync$"), lambda builder, match, operands: builder.emit("warp_barrier")),
]
