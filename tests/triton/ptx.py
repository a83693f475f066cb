"""Runs straight-line PTX on the CPU, bit by bit: the few instructions that the kernels' own text uses.

Semantics are those of NVIDIA's PTX ISA. A register is a uint32 array, each element a thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

Registers = dict[str, np.ndarray]
_JOINED = re.compile(r"mov\.b32 (\S+),\{(\S+),(\S+)$")
_IMMEDIATE = re.compile(r"-?(0x[0-9A-Fa-f]+|\d+)$")
_LOP3_TERMS = ((0x80, 1, 1, 1), (0x40, 1, 1, 0), (0x20, 1, 0, 1), (0x10, 1, 0, 0),
               (0x08, 0, 1, 1), (0x04, 0, 1, 0), (0x02, 0, 0, 1), (0x01, 0, 0, 0))  # fmt: skip


def run(text: str, **inputs: np.ndarray) -> tuple[Registers, list[np.ndarray]]:
    """Execute ``{ .reg ...; instructions }``.

    Args:
        inputs: uint32 arrays for ``$2`` and so on, named ``r2``.

    Returns:
        all registers at the end, and the operand of every fused multiply-add that squares it, in order.
    """
    registers: Registers = {f"${name[1:]}": value.astype(np.uint32) for name, value in inputs.items()}
    size = next(iter(registers.values())).shape
    squared: list[np.ndarray] = []
    declared = set(registers)
    for statement in filter(None, (part.strip(" {}") for part in text.split(";"))):
        if statement.startswith(".reg"):
            declared |= {name.strip() for name in statement.removeprefix(".reg .b32").split(",")}
            continue
        if joined := _JOINED.match(statement):  # of two 16-bit registers
            assert joined[1] in declared
            registers[joined[1]] = registers[joined[2]] & 0xFFFF | registers[joined[3]] << 16
            continue
        name, arguments = statement.split(maxsplit=1)
        target, *operands = (argument.strip() for argument in arguments.split(","))
        assert target in declared or target.startswith("$"), f"{target} is not declared"
        values = [_value(operand, registers, size) for operand in operands]
        if name.startswith("fma") and operands[0] == operands[1]:
            squared.append(values[0])
        registers[target] = _INSTRUCTIONS[name](*values).astype(np.uint32)
    return registers, squared


def _value(operand: str, registers: Registers, size: tuple[int, ...]) -> np.ndarray:
    if _IMMEDIATE.match(operand):
        return np.full(size, int(operand, 0) & 0xFFFFFFFF, np.uint32)
    return registers[operand]


def halves(register: np.ndarray, half: bool) -> np.ndarray:
    """The two 16-bit floats of registers ``[...]`` as float64 ``[..., 2]``, the low one first."""
    bits = np.stack([register & 0xFFFF, register >> 16], axis=-1)
    if half:
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits << 16).astype(np.uint32).view(np.float32).astype(np.float64)


def _round(value: np.ndarray, half: bool) -> np.ndarray:
    """float64 -> bits of float16 or bfloat16, to nearest, ties to even, in one step."""
    if half:
        return value.astype(np.float16).view(np.uint16).astype(np.uint32)
    size = np.abs(value)
    assert np.all((value == 0) | ((size > 2.0**-100) & (size < 2.0**100))), "outside of what is emulated"
    bits = value.view(np.int64)
    spare = 52 - 7
    rounded = (bits + ((1 << (spare - 1)) - 1) + ((bits >> spare) & 1)) >> spare << spare
    return rounded.view(np.float64).astype(np.float32).view(np.uint32) >> 16


def _fma(half: bool) -> Callable[..., np.ndarray]:
    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        product = halves(a, half) * halves(b, half)  # 22 bits at most: exact in float64
        added = halves(c, half)
        total = product + added
        back = total - product
        lost = (product - (total - back)) + (added - back)
        assert not lost.any(), "the sum needs more than float64 has: the emulation would round twice"
        low, high = np.moveaxis(_round(total, half), -1, 0)
        return low | (high << 16)

    return fma


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for bit, *wanted in _LOP3_TERMS:
        if int(table.flat[0]) & bit:
            term = np.full_like(a, 0xFFFFFFFF)
            for value, positive in zip((a, b, c), wanted, strict=True):
                term &= value if positive else ~value
            result |= term
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    pool = np.stack([(source >> (8 * i)) & 0xFF for source in (a, b) for i in range(4)])
    result = np.zeros_like(a)
    for place in range(4):
        nibble = (selector >> (4 * place)) & 15
        byte = np.take_along_axis(pool, (nibble & 7)[None].astype(np.int64), axis=0)[0]
        result |= np.where(nibble & 8, (byte >> 7) * 0xFF, byte) << (8 * place)
    return result


_INSTRUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, n: a >> n,
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "shr.s32": lambda a, n: (a.view(np.int32) >> n.view(np.int32)).view(np.uint32),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "add.s32": lambda a, b: a + b,
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.f16x2": _fma(half=True),
    "fma.rn.bf16x2": _fma(half=False),
}
