"""PTX that turns packed words of a grid codec into weights, in registers of two 16-bit floats.

A 32-bit register holds two neighbouring words of a plane (``codecs/grid.py`` has the layout). For group g of 32
columns, code n = 0..3 of a word has its bits at 4 n + p s of a plane of p bits, s = g mod (4 / p). The steps:

1. align the planes with shifts and join them by bit-select (``lop3`` 0xE4), four codes at a time;
2. mask one code of each word and put it under the exponent of a power of two B: the float B + q / 2^(k-1)
   (``lop3`` 0xEA), so no integer is ever converted;
3. subtract B + 1, which gives t exactly, and evaluate t * (t * t + C0).

bfloat16 has 7 bits of mantissa, but its eight lowest bits count on without a step: below 2^-125, among the subnormal
numbers and the first normal ones, a number is its bits times 2^-133. So a code that ends at bit 7 takes no exponent:
2^126 times it, minus 1, is t. That needs multiplications that keep subnormal numbers, as PTX promises for ``fma`` of
bfloat16.

All constants are exact in both formats, t is exact, and the two rounded steps err by at most 2 units in the last place
together. With a scale a third step is rounded: t times the scale. All three together err by less than 2.6 * 2^-8.
"""

from __future__ import annotations

import re
import struct

from ciuic_kernels.codecs.grid import LINEAR, PLANES

JOIN, UNDER = "0xE4", "0xEA"  # lop3 tables: c selects a or b; (a and b) or c
NIBBLES = "0x0F0F0F0F"
SUBNORMAL = 2.0**-133  # what the lowest bit of a bfloat16 is worth below 2^-125


class _Program:
    """PTX text under construction."""

    def __init__(self, half: bool) -> None:
        self.half, self.mantissa, self.type = half, 10 if half else 7, "f16x2" if half else "bf16x2"
        self.span = 10 if half else 8  # lowest bits that can hold a code
        self.lines: list[str] = []
        self.registers = 0
        self.shifts: dict[tuple[str, int], str] = {}

    def emit(self, text: str) -> str:
        """Add an instruction with ``@`` for a fresh register, which is returned."""
        self.registers += 1
        name = f"r{self.registers}"
        self.lines.append(text.replace("@", name))
        return name

    def pair(self, value: float) -> str:
        """The bits of a value in both halves of a register."""
        if self.half:
            bits: int = struct.unpack("<H", struct.pack("<e", value))[0]
        else:
            wide: int = struct.unpack("<I", struct.pack("<f", value))[0]
            assert wide & 0xFFFF == 0, f"{value} is not a bfloat16"
            bits = wide >> 16
        return f"0x{bits * 0x10001:08X}"

    def shift(self, source: str, right: int) -> str:
        """``source`` shifted right, or left when negative; the same shift is made once."""
        if right == 0:
            return source
        if (source, right) not in self.shifts:
            text = f"{'shr' if right > 0 else 'shl'}.b32 @,{source},{abs(right)};"
            self.shifts[source, right] = self.emit(text)
        return self.shifts[source, right]

    def join(self, a: str, b: str, mask: str) -> str:
        """Bits of a where the mask is set, of b elsewhere."""
        return self.emit(f"lop3.b32 @,{a},{b},{mask},{JOIN};")

    def centred(self, source: str, position: int, width: int) -> str:
        """A field q as ``t = q / 2^(width - 1) - 1``, exact."""
        unit = 2.0 ** (1 - width)
        right = next(s for s in (0, 8, position) if 0 <= position - s <= self.span - width)
        place = position - right
        if place + width <= self.mantissa:
            base = unit * 2.0 ** (self.mantissa - place)
            number = self.field(self.shift(source, right), place, width, base)
            return self.fma(number, self.pair(1.0), self.pair(-(base + 1)))
        if (right, width) == (8, 8):
            number = self.emit(f"prmt.b32 @,{source},0,0x4341;")
        else:
            number = self.field(self.shift(source, right), place, width, 0.0)
        return self.fma(number, self.pair(unit / (SUBNORMAL * 2.0**place)), self.pair(-1.0))

    def field(self, source: str, place: int, width: int, base: float) -> str:
        """The bits of a field where they are, under the exponent of ``base``."""
        mask = f"0x{(((1 << width) - 1) << place) * 0x10001:08X}"
        return self.emit(f"lop3.b32 @,{source},{mask},{self.pair(base)},{UNDER};")

    def fma(self, a: str, b: str, c: str) -> str:
        return self.emit(f"fma.rn.{self.type} @,{a},{b},{c};")

    def text(self, outputs: list[str]) -> str:
        """The whole block; packed constants become registers, as fma takes no immediates."""
        constants: dict[str, str] = {}

        def named(match: re.Match[str]) -> str:
            return constants.setdefault(match[0], f"c{len(constants)}")

        body = [
            re.sub(r"0x[0-9A-F]{8}", named, line) if line.startswith("fma") else line for line in self.lines
        ]
        for i, register in enumerate(outputs):
            body = [re.sub(rf"\b{register}\b", f"${i}", line) for line in body]
        names = [*constants.values(), *(f"r{i + 1}" for i in range(self.registers))]
        moves = [f"mov.b32 {name},{value};" for value, name in constants.items()]
        return f"{{ .reg .b32 {','.join(names)}; {' '.join(moves + body)} }}"


def unpack(width: int, group: int, half: bool) -> str:
    """PTX with inputs ``$4`` (low plane) and ``$5`` (high plane), outputs ``$0`` to ``$3``: codes 0..3 of the words.

    Args:
        width: k of the codec.
        group: which 32 of the 128 columns, 0 to 3.
        half: float16 results, else bfloat16.
    """
    program = _Program(half)
    return program.text(_weights(program, width, group, "$4", "$5"))


def unpack_scaled(width: int, part: int) -> str:
    """PTX for 64 columns times their scales, in bfloat16: outputs ``$0`` to ``$7``, codes 0..3 of two groups.

    Inputs, one for each group: ``$8`` and ``$9`` low plane, ``$10`` and ``$11`` high plane, ``$12`` and ``$13`` the
    scale in both halves.

    Args:
        part: which 64 of the 128 columns, 0 or 1.
    """
    program = _Program(half=False)
    outputs = []
    for i in range(2):
        outputs += _weights(program, width, 2 * part + i, f"${8 + i}", f"${10 + i}", f"${12 + i}")
    return program.text(outputs)


def _weights(program: _Program, width: int, group: int, low: str, high: str, scale: str = "") -> list[str]:
    """Codes 0..3 of two words as levels, times the scale if there is one."""
    zero, results = program.pair(-0.0), []
    values = [program.centred(*field, width) for field in _fields(program, width, group, low, high)]
    for t in values:
        curve = program.fma(t, t, program.pair(LINEAR[width]))
        results.append(program.fma(program.fma(t, scale, zero) if scale else t, curve, zero))
    return results


def _fields(program: _Program, width: int, group: int, low: str, high: str) -> list[tuple[str, int]]:
    """Where the whole codes 0..3 lie after joining the planes: (register, first bit)."""
    planes = PLANES[width]
    start = planes[0] * (group % (4 // planes[0]))
    if len(planes) == 1:
        return [(low, 4 * n + start) for n in range(4)]
    high_start = planes[1] * (group % (4 // planes[1]))
    if width == 3:
        joined = program.join(program.shift(low, start), program.shift(high, high_start - 2), "0x33333333")
        return [(joined, 4 * n) for n in range(4)]
    even = program.join(low, program.shift(high, high_start - 4), NIBBLES)
    odd = program.join(program.shift(low, 4), program.shift(high, high_start), NIBBLES)
    return [(even, 0), (odd, 0), (even, 8), (odd, 8)]


def scales(first_byte: int, rows: int) -> str:
    """PTX for scales of ``rows`` rows in one register: outputs float32, then the scale word, then 2^23 * exponent.

    A byte permute isolates the scale byte S, one multiply-add makes the float: ``S * (2^31 + 2^18) + 2^23 X``.
    """
    lines = []
    for row in range(rows):
        byte = first_byte + row * (4 // rows)
        lines.append(f"prmt.b32 t,${rows},0,0x444{byte}; mad.lo.s32 ${row},t,0x80040000,${rows + 1};")
    return "{ .reg .b32 t; " + " ".join(lines) + " }"


SCALE_FORMS = [(byte, 2) for byte in (0, 1)] + [(byte, 1) for byte in range(4)]
"""(first byte, rows in a register) of groups of 64 and of 32 columns."""

UNPACK = {
    (width, group, half): unpack(width, group, half)
    for width in PLANES
    for group in range(4)
    for half in (False, True)
}

UNPACK_SCALED = {(width, part): unpack_scaled(width, part) for width in PLANES for part in (0, 1)}
