"""Turns PTX into the machine's program: numbered registers, constants, resolved labels."""

from __future__ import annotations

from dataclasses import dataclass

from tests.triton.emulator.flow import joins
from tests.triton.emulator.isa import SPECIAL, SPECIALS
from tests.triton.emulator.operands import Ref, offsets
from tests.triton.emulator.parse import Function, Line, parse
from tests.triton.emulator.translate import Translator


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


def lower(text: str, operations: list[str]) -> Code:
    """The program of the one kernel in a PTX module.

    Args:
        operations: ``name types`` of the machine's operations in order.
    """
    numbers = {what.split()[0]: number for number, what in enumerate(operations)}
    kinds = {what.split()[0]: tuple(what.split()[1:]) for what in operations}
    functions = parse(text)
    builder = Translator(kinds, functions=functions)
    starts: dict[object, int] = {}
    for function in functions.values():
        builder.function = function
        meeting = joins(function)
        starts["function", function.name] = len(builder.ops)
        for index, line in enumerate(function.lines):
            starts["line", function.name, index] = len(builder.ops)
            builder.line, builder.meet = line, meeting.get(index, -1)
            builder.translate()
        starts["line", function.name, len(function.lines)] = len(builder.ops)
        builder.line = Line("trap", (), "", False, builder.line.number, builder.line.source)
        builder.emit("trap")
    entry = next(function for function in functions.values() if function.is_entry)
    return _numbered(builder, numbers, starts, entry)


def _numbered(
    builder: Translator, numbers: dict[str, int], starts: dict[object, int], entry: Function
) -> Code:
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
