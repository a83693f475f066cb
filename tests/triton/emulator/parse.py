"""Reads PTX: functions, their parameters, registers and instructions, with the line of the source of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_HEADER = re.compile(r"^(?:\.visible\s+|\.weak\s+)?\.(entry|func)\b([^{;]*)\n\{", re.MULTILINE)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
_LOCATION = re.compile(r"\.loc\b[^\n]*?(?://\s*(\S+:\d+)[^\n]*)?(?=\n)")
_LABEL = re.compile(r"([\w$.]+):(?!:)")
_STATEMENT = re.compile(r"([^;{}]*(?:\{[^{};]*\}[^;{}]*)*);")
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)


class UnreadablePtx(ValueError):
    """The text is not PTX that this parser knows."""


@dataclass(frozen=True)
class Line:
    """One instruction.

    Attributes:
        opcode: with its modifiers, ``add.s32``.
        operands: as written; a vector ``{a, b}`` or an address ``[a+4]`` is one operand.
        guard: predicate register or empty; ``negated``: executed where it is false.
        number: line of the PTX; source: ``file.py:12:3``, where the compiler says.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str
    negated: bool
    number: int
    source: str


@dataclass
class Function:
    """A kernel or a function that it calls.

    Attributes:
        parameters: name and type of each, in order.
        registers: name to type; names of inner scopes have a suffix.
        labels: name to index into ``lines``.
    """

    name: str
    is_entry: bool
    parameters: list[tuple[str, str]]
    registers: dict[str, str] = field(default_factory=dict)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def type_of(self, register: str) -> str | None:
        """The declared type of a register; None if there is none of this name."""
        if register in self.registers:
            return self.registers[register]
        for prefix, kind in self.ranges:
            if register.startswith(prefix) and register[len(prefix) :].isdigit():
                return kind
        return None


def split_operands(text: str) -> tuple[str, ...]:
    """Operands at the top level of braces, brackets and parentheses."""
    if not any(bracket in text for bracket in "{[("):
        return tuple(part.strip() for part in text.split(",")) if text else ()
    found, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            found.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*found, last) if last else tuple(found)


def parse(text: str) -> dict[str, Function]:
    """All functions of a module by name.

    Raises:
        UnreadablePtx: with the line that cannot be read.
    """
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    functions = {}
    for header in _HEADER.finditer(text):
        before, _, after = header[2].partition("(")
        parameters: list[tuple[str, str]] = []
        if not before.strip():  # (.param .b32 func_retval0) name(...)
            first, _, rest = after.partition(")")
            parameters = _parameters(first)
            before, _, after = rest.partition("(")
        function = Function(before.split()[-1], header[1] == "entry", _parameters(after) + parameters)
        _body(function, text, header.end(), text.index("\n}", header.end()))
        functions[function.name] = function
    return functions


def _parameters(text: str) -> list[tuple[str, str]]:
    found = []
    for part in text.partition(")")[0].split(","):
        words = part.split()
        if ".param" in words:
            name = words[-1]
            types = [word[1:] for word in words if re.fullmatch(r"\.[bsuf]\d+", word)]
            found.append((name, types[0]))
    return found


def _body(function: Function, text: str, at: int, end: int) -> None:
    scopes: list[dict[str, str]] = [{}]
    scope, source = 0, ""
    line, counted = text.count("\n", 0, at) + 1, at
    while match := _SPACE.match(text, at, end):
        at = match.end()
        if at >= end:
            return
        line, counted = line + text.count("\n", counted, at), at
        if text[at] == "{":
            scopes.append({})
            scope += 1
            at += 1
        elif text[at] == "}":
            scopes.pop()
            at += 1
        elif match := _LOCATION.match(text, at):
            source = match[1] or source
            at = match.end()
        elif match := _LABEL.match(text, at):
            function.labels[match[1]] = len(function.lines)
            at = match.end()
        elif match := _STATEMENT.match(text, at):
            _statement(function, re.sub(r"//[^\n]*", "", match[1]).strip(), scopes, scope, line, source)
            at = match.end()
        else:
            raise UnreadablePtx(f"line {line}: {text[at : at + 80]!r}")


def _statement(
    function: Function, text: str, scopes: list[dict[str, str]], scope: int, line: int, source: str
) -> None:
    if text.startswith("."):
        if match := _REGISTERS.match(text):
            for name in match[2].split(","):
                _declare(function, match[1], name.strip(), scopes, scope)
        elif not text.startswith((".param", ".pragma")):
            raise UnreadablePtx(f"line {line}: {text!r}")
        return
    match = _INSTRUCTION.match(text)
    if match is None:
        raise UnreadablePtx(f"line {line}: {text!r}")

    def named(word: re.Match[str]) -> str:
        return next((names[word[0]] for names in reversed(scopes) if word[0] in names), word[0])

    guard, arguments = match[2] or "", match[4]
    if any(scopes):
        guard, arguments = (re.sub(r"[%\w$]+", named, part) for part in (guard, arguments))
    function.lines.append(Line(match[3], split_operands(arguments), guard, match[1] == "!", line, source))


def _declare(function: Function, kind: str, name: str, scopes: list[dict[str, str]], scope: int) -> None:
    if match := re.fullmatch(r"([%\w$]+)<\d+>", name):
        function.ranges.append((match[1], kind))
    elif len(scopes) > 1:
        scopes[-1][name] = f"{name}.{scope}"
        function.registers[scopes[-1][name]] = kind
    else:
        function.registers[name] = kind
