"""Operands of instructions as registers, constants and addresses of the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.triton.emulator.isa import PARAMETER_BASE, SHARED_BASE, SPECIAL, bits_of_type
from tests.triton.emulator.parse import Function, Line, split_operands

ROOM = {32: "u32", 64: "u64", 1: "p"}
NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$|0[dD]([0-9a-fA-F]{16})$")


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
class Builder:
    """What is known while a kernel is translated: the operations so far, the line and the function at hand."""

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
        if NUMBER.match(text):
            number = int(text.rstrip("U"), 0)
            return self.constant(number & 0xFFFF if narrow else number, file)
        return self.register(text, file)

    def address(self, text: str, file: str) -> tuple[Ref, int]:
        """``[register + offset]`` or ``[global_smem+offset]``."""
        base, *rest = (part.strip() for part in re.split(r"\+", text.strip("[] ")))
        if len(rest) > 1 or (rest and not NUMBER.match(rest[0])):
            raise self.refuse(f"cannot read the address {text}")
        offset = int(rest[0], 0) if rest else 0
        return self.value(base, file), offset

    def vector(self, text: str) -> list[str]:
        return list(split_operands(text.strip()[1:-1])) if text.startswith("{") else [text]

    def narrowed(self, text: str, file: str, narrow: bool = False) -> Ref:
        """The source of a conversion or a store, which may be in a wider register than its type."""
        if file == "u32" and self.function.type_of(text) in ("b64", "s64", "u64"):
            low = Ref("u32", (self.function.name, "low", text))
            self.emit("low32", low, self.register(text, "u64"))
            return low
        return self.value(text, file, narrow)


def offsets(function: Function) -> dict[str, tuple[int, int]]:
    """Where each parameter of a kernel lies and how many bytes it has."""
    found, at = {}, 0
    for name, kind in function.parameters:
        nbytes = bits_of_type(kind) // 8
        at = -(-at // nbytes) * nbytes
        found[name] = (at, nbytes)
        at += nbytes
    return found
