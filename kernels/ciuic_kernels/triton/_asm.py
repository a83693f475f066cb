"""PTX that turns packed words of a grid codec into weights, in registers of two 16-bit floats.

A 32-bit register holds two neighbouring words of a plane (``codecs/grid.py`` has the layout). For group g of 32
columns, code n = 0..3 of a word has its bits at 4 n + p s of a plane of p bits, s = g mod (4 / p). The steps:

1. align the planes with shifts and join them by bit-select (``lop3`` 0xE4), four codes at a time;
2. mask one code of each word and put it under the exponent of a power of two B: the float B + q / 2^(k-1)
   (``lop3`` 0xEA), so no integer is ever converted;
3. subtract B + 1, which gives t exactly, and evaluate t * (t * t + C0).

With a mantissa of 7 bits bfloat16 cannot hold 8-bit codes; its two nibbles take two powers of two and one more
addition. All constants are exact in both formats, t is exact, and the two rounded steps err by at most 2 units in
the last place together.
"""

from __future__ import annotations

import re
import struct

from ciuic_kernels.codecs.grid import LINEAR, PLANES

JOIN, UNDER = "0xE4", "0xEA"  # lop3 tables: c selects a or b; (a and b) or c
NIBBLES = "0x0F0F0F0F"


class _Program:
    """PTX text under construction."""

    def __init__(self, half: bool) -> None:
        self.half, self.mantissa, self.type = half, 10 if half else 7, "f16x2" if half else "bf16x2"
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

    def number(self, source: str, position: int, width: int, unit: int) -> tuple[str, float]:
        """The field as the float B + q / 2^unit; returns register and B."""
        room = self.mantissa - width
        right = next(s for s in (0, 8, position) if 0 <= position - s <= room)
        place = position - right
        base = 2.0 ** (self.mantissa - place - unit)
        mask = f"0x{(((1 << width) - 1) << place) * 0x10001:08X}"
        register = self.shift(source, right)
        return self.emit(f"lop3.b32 @,{register},{mask},{self.pair(base)},{UNDER};"), base

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
    one, unit = program.pair(1.0), width - 1
    if width == 8 and not half:
        values = [_byte_in_two_steps(program, n) for n in range(4)]
    else:
        values = []
        for source, position in _fields(program, width, group):
            number, base = program.number(source, position, width, unit)
            values.append(program.fma(number, one, program.pair(-(base + 1))))
    results = []
    for t in values:
        curve = program.fma(t, t, program.pair(LINEAR[width]))
        results.append(program.fma(t, curve, program.pair(-0.0)))
    return program.text(results)


def _fields(program: _Program, width: int, group: int) -> list[tuple[str, int]]:
    """Where the whole codes 0..3 lie after joining the planes: (register, first bit)."""
    low, high = "$4", "$5"
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


def _byte_in_two_steps(program: _Program, n: int) -> str:
    """t of 8-bit codes in bfloat16: B + high / 8, then 1 + low / 128 on top; every step is exact."""
    high, high_base = program.number("$5", 4 * n, 4, 3)
    low, low_base = program.number(program.shift("$4", 4 * n), 0, 4, 7)
    one = program.pair(1.0)
    rest = program.fma(high, one, program.pair(-(high_base + 1 + low_base)))
    return program.fma(low, one, rest)


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
