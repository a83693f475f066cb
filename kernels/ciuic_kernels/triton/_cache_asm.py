"""PTX that turns a word of eight codes of a compressed cache into eight 16-bit floats, in order, times a scale.

Codes are first spread to the eight nibbles of a register. Up to eight levels are then looked up by byte permute
(``prmt`` takes a nibble as the index of one of eight bytes): once for their high, once for their low bytes. Lloyd-Max
levels of four bits have their sign on top: magnitudes are looked up, and a permute in the mode that repeats the sign
of 0x80 tells which nibbles have the top bit. Sixteen evenly spaced levels are put under the exponent of a power of
two instead, as in ``_asm.py``. Of eight bits a word has four codes: the lower seven are put under the exponent of 128,
and 128 or 256 is subtracted, which is a matter of one bit.
"""

from __future__ import annotations

import struct

from ciuic_kernels.cache_codes import LLOYD, PLANES, SCALE_OF_ONE, SCALES_PER_OCTAVE

_SPREAD = {
    (2, 4): ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)),
    (1, 4): ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)),
}
"""Bits of a plane -> shifts and masks that move its eight fields to nibbles."""

OR_AND, AND_OR, AND_XOR = "0xA8", "0xEA", "0x6A"
"""Tables of ``lop3``: c and (a or b); (a and b) or c; (a and b) xor c."""


def bits_of(value: float, half: bool) -> int:
    """The 16 bits of a value in float16 or bfloat16, rounded to nearest."""
    if half:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    wide = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return (wide + 0x7FFF + (wide >> 16 & 1)) >> 16


class _Program:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.registers = 0

    def emit(self, text: str) -> str:
        """Add an instruction with ``@`` for a fresh register, which is returned."""
        self.registers += 1
        name = f"r{self.registers}"
        self.lines.append(text.replace("@", name))
        return name

    def constant(self, value: int) -> str:
        return self.emit(f"mov.b32 @,0x{value:08X};")

    def spread(self, source: str, width: int) -> str:
        """The eight fields of a plane in nibbles."""
        for shift, mask in _SPREAD.get((width, 4), ()):
            moved = self.emit(f"shl.b32 @,{source},{shift};")
            source = self.emit(f"lop3.b32 @,{source},{moved},0x{mask:08X},{OR_AND};")
        return source

    def nibbles(self, bits: int, low: str, high: str) -> str:
        """Codes in nibbles, from the words of the planes."""
        planes = PLANES[bits]
        code = self.spread(low, planes[0])
        if len(planes) == 1:
            return code
        top = self.emit(f"shl.b32 @,{self.spread(high, planes[1])},{planes[0]};")
        return self.emit(f"or.b32 @,{code},{top};")

    def table(self, values: list[int], high: bool) -> tuple[str, str]:
        """The high or low bytes of up to eight 16-bit values, in two registers."""
        octets = [value >> 8 if high else value & 255 for value in values]
        octets += octets[:1] * (8 - len(octets))
        words = [sum(byte << 8 * i for i, byte in enumerate(octets[at : at + 4])) for at in (0, 4)]
        return self.constant(words[0]), self.constant(words[1])


def _looked_up(program: _Program, code: str, values: list[float], half: bool, signs: bool) -> list[str]:
    """Four registers of two values each, from nibbles."""
    numbers = [bits_of(value, half) for value in values]
    tops, bottoms = program.table(numbers, True), program.table(numbers, False)
    index = program.emit(f"and.b32 @,{code},0x77777777;") if signs else code
    sign = program.constant(0x80808080) if signs else ""
    results = []
    for half_word in range(2):
        if half_word:
            index = program.emit(f"shr.u32 @,{index},16;")
            code = program.emit(f"shr.u32 @,{code},16;") if signs else index
        top = program.emit(f"prmt.b32 @,{tops[0]},{tops[1]},{index};")
        bottom = program.emit(f"prmt.b32 @,{bottoms[0]},{bottoms[1]},{index};")
        if signs:
            repeated = program.emit(f"prmt.b32 @,{sign},{sign},{code};")
            doubled = program.emit(f"shl.b32 @,{repeated},1;")
            top = program.emit(f"lop3.b32 @,{doubled},0x80808080,{top},{AND_XOR};")
        results += [program.emit(f"prmt.b32 @,{bottom},{top},{order};") for order in ("0x5140", "0x7362")]
    return results


def _evenly_spaced(program: _Program, code: str, half: bool) -> list[str]:
    """Four registers of two values each: nibbles less 8."""
    base = 1024.0 if half else 128.0
    magic, one, less = (
        program.constant(bits_of(value, half) * 0x10001) for value in (base, 1.0, -(base + 8))
    )
    pairs = []
    for place in range(4):
        moved = program.emit(f"shr.u32 @,{code},{4 * place};") if place else code
        number = program.emit(f"lop3.b32 @,{moved},0x000F000F,{magic},{AND_OR};")
        pairs.append(program.emit(f"fma.rn.{'f16x2' if half else 'bf16x2'} @,{number},{one},{less};"))
    orders = ((0, 1, "0x5410"), (2, 3, "0x5410"), (0, 1, "0x7632"), (2, 3, "0x7632"))
    return [program.emit(f"prmt.b32 @,{pairs[a]},{pairs[b]},{order};") for a, b, order in orders]


def _bytes(program: _Program, word: str, channels: bool, half: bool) -> list[str]:
    """Two registers of two values each: signed bytes, or bytes less 128."""
    pairs = [program.emit(f"prmt.b32 @,{word},0,{order};") for order in ("0x4140", "0x4342")]
    if half:
        magic, one, less = (program.constant(bits_of(x, True) * 0x10001) for x in (1024.0, 1.0, -1152.0))
        turned = magic if channels else program.constant(0x64806480)
        numbers = [program.emit(f"xor.b32 @,{pair},{turned};") for pair in pairs]
        return [program.emit(f"fma.rn.f16x2 @,{number},{one},{less};") for number in numbers]
    magic, one = (program.constant(bits_of(x, False) * 0x10001) for x in (128.0, 1.0))
    less = program.constant(
        0xC380C380 if channels else 0xC300C300
    )  # -256 or -128; their bits differ in 0x0080
    values = []
    for pair in pairs:
        number = program.emit(f"lop3.b32 @,{pair},0x007F007F,{magic},{AND_OR};")
        base = program.emit(f"lop3.b32 @,{pair},0x00800080,{less},{AND_XOR};")
        values.append(program.emit(f"fma.rn.bf16x2 @,{number},{one},{base};"))
    return values


def unpack(bits: int, channels: bool, half: bool, scaled: bool) -> tuple[str, list[str]]:
    """Instructions that unpack a word of each plane.

    Inputs are named after the outputs, a word of ``n`` codes having ``$0`` to ``$(n - 1)``: ``$n`` is the word of the
    low plane, ``$(n + 1)`` of the high one, ``$(n + 2)`` the scale, 16 bits of the dtype of the results.

    Args:
        bits: of a code.
        channels: codes of a channel, less half their number; else levels of a token.
        half: float16 results, else bfloat16.
        scaled: times the scale.

    Returns:
        the text, and the registers that hold codes 0 and 1, 2 and 3, and so on.
    """
    program, count = _Program(), 4 if bits == 8 else 8
    registers = _levels(program, bits, channels, half, f"${count}", f"${count + 1}")
    if scaled:
        scale = program.emit(f"mov.b32 @,{{${count + 2},${count + 2}}};")
        zero = program.constant(0x80008000)  # -0: what is added to a product and changes nothing
        form = "f16x2" if half else "bf16x2"
        registers = [program.emit(f"fma.rn.{form} @,{value},{scale},{zero};") for value in registers]
    names = ",".join(f"r{i + 1}" for i in range(program.registers))
    return f".reg .b32 {names}; " + " ".join(program.lines), registers


def _levels(program: _Program, bits: int, channels: bool, half: bool, low: str, high: str) -> list[str]:
    if bits == 8:
        return _bytes(program, low, channels, half)
    code = program.nibbles(bits, low, high)
    if channels and bits == 4:
        return _evenly_spaced(program, code, half)
    if channels:
        steps = [i - (1 << bits) / 2 for i in range(1 << bits)]
        return _looked_up(program, code, steps, half, signs=False)
    if bits == 4:
        return _looked_up(program, code, list(LLOYD[bits]), half, signs=True)
    return _looked_up(program, code, [*LLOYD[bits], *(-x for x in LLOYD[bits])], half, signs=False)


def text(bits: int, channels: bool, half: bool, scaled: bool) -> str:
    """The whole block, with outputs ``$0``, ``$1`` and so on of 16 bits."""
    body, registers = unpack(bits, channels, half, scaled)
    ends = [f"mov.b32 {{${2 * i},${2 * i + 1}}},{register};" for i, register in enumerate(registers)]
    return "{ " + body + " " + " ".join(ends) + " }"


UNPACK = {
    (bits, channels, half, scaled): text(bits, channels, half, scaled)
    for bits in PLANES
    for channels, scaled in ((True, False), (False, False), (False, True))
    for half in (False, True)
}


def _single(value: float) -> str:
    """A float32 as PTX writes it."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


SCALE = (
    "{ .reg .f32 x; cvt.rn.f32.u32 x,$1; "
    f"fma.rn.f32 x,x,{_single(1 / SCALES_PER_OCTAVE)},{_single(-SCALE_OF_ONE / SCALES_PER_OCTAVE)}; "
    "ex2.approx.ftz.f32 $0,x; }"
)
"""The float32 that a scale byte stands for, but for NaN: a power of two."""
