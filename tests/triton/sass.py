"""Reading machine code: the loops of a kernel that multiply, and what each of them costs."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

BLOCK_WEIGHTS = 64 * 128
MMA = ("HMMA", "HGMMA", "UTCHMMA")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_GUARD = re.compile(r"^@!?U?P\w+\s+")


@dataclass(frozen=True)
class Loop:
    """An innermost loop around matrix instructions.

    Attributes:
        weights: weights multiplied in one turn, by all threads of a program.
        per_weight: instructions of one turn, by all threads, for each of them.
        mma: the matrix instruction.
        copies: pipelined copies of 16 bytes to shared memory.
        loads: plain loads from global memory; ``wide_loads``: of 8 bytes or more.
        stores: to shared memory; ``shuffles``: between threads; ``spills``: reads and writes of the stack.
    """

    weights: int
    per_weight: float
    mma: str
    copies: int
    loads: int
    wide_loads: int
    stores: int
    shuffles: int
    spills: int = 0

    @property
    def whole_block(self) -> bool:
        """Whether a turn is a full block of a grid, not a few columns of any block."""
        return self.weights >= BLOCK_WEIGHTS


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of ``nvdisasm -c``, and at which of them each label stands."""
    found: list[str] = []
    labels = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(_GUARD.sub("", instruction[1]))
    return found, labels


def accesses(code: list[str]) -> Counter[str]:
    """How many instructions read and write global and shared memory, or pass values between threads, by name.

    Of the name what matters is left: ``LDG.128``, ``STG.U16``, ``STS``.
    """
    found: Counter[str] = Counter()
    for text in code:
        name, *rest = text.split()[0].split(".")
        if name in ("LDG", "STG", "LDS", "LDSM", "STS", "SHFL"):
            width = next((part for part in rest if re.fullmatch(r"[US]?(8|16|64|128)", part)), "")
            found[f"{name}.{width}" if width and name in ("LDG", "STG") else name] += 1
    return found


def loops(sass: str, block_m: int, num_warps: int) -> list[Loop]:
    """Innermost loops around matrix instructions, cheapest first.

    Args:
        block_m: tokens of a tile.
        num_warps: warps of a program.
    """
    code, labels = instructions(sass)
    spans = []
    for end, text in enumerate(code):
        branch = _BRANCH.search(text)
        start = labels.get(branch[1], end + 1) if branch else end + 1
        if start <= end and any(_opcode(t) in MMA for t in code[start : end + 1]):
            spans.append((start, end + 1))
    # Slow paths stand after the code and jump back into the middle of a loop: those are no loops.
    real = [a for a in spans if not any(b[0] < a[0] < b[1] < a[1] for b in spans)]
    inner = {a for a in real if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in real)}
    found = [_loop(code[start:end], block_m, num_warps) for start, end in sorted(inner)]
    return sorted(found, key=lambda loop: (not loop.whole_block, loop.per_weight))


def _opcode(text: str) -> str:
    return text.split()[0].split(".")[0]


def _loop(body: list[str], block_m: int, num_warps: int) -> Loop:
    count = Counter(_opcode(text) for text in body)
    weights = sum(_products(text, num_warps, block_m) for text in body) // block_m
    return Loop(
        weights=weights,
        per_weight=round(len(body) * 32 * num_warps / weights, 2),
        mma=next(name for name in MMA if count[name]),
        copies=sum(text.startswith("LDGSTS") and ".128" in text.split()[0] for text in body),
        loads=count["LDG"],
        wide_loads=sum(bool(re.match(r"LDG\.\S*\b(64|128)\b", text)) for text in body),
        stores=count["STS"],
        shuffles=count["SHFL"],
        spills=count["LDL"] + count["STL"],
    )


def _products(text: str, num_warps: int, block_m: int) -> int:
    """Multiplications of one matrix instruction in all warps of a program."""
    name = text.split()[0]
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        return int(shape[1]) * int(shape[2]) * int(shape[3]) * num_warps // 4
    if name.startswith("HMMA.16816"):
        return 16 * 8 * 16 * num_warps
    if _opcode(name) == "UTCHMMA":  # its shape is in a descriptor: 64 rows, all tokens, 16 columns
        return 64 * block_m * 16
    assert _opcode(name) not in MMA, f"{name} has a shape that is not known here"
    return 0
