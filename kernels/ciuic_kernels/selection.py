"""Which kernel computes a product, and with which launch: pure functions of sizes, dtype and device facts.

A product of few tokens runs fused: weights go from their blocks to the MMA. From some number of tokens on the matrix
is decoded in bands and multiplied by the vendor's GEMM, which costs the traffic of a decoded copy but runs at full
speed. A table of *rules* says where the change is and how fused kernels are launched; the first rule that fits wins.
Tables measured on a GPU (``tuning.py``) come before the defaults here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ciuic_kernels.device import DeviceFacts
from ciuic_kernels.format import ceil_div
from ciuic_kernels.work import ANY_SPARSE, MAX_EXACT, compiled_kinds

MAX_TOKENS = 1 << 62
LINEAR, EXPERTS = "linear", "expert_linear"
SIZES = {"small": 16 << 20, "medium": 60 << 20, "large": MAX_TOKENS}
"""Classes of matrices by the largest number of weights in each."""

PROGRAMS_PER_PROCESSOR = 8

MAX_SHARED = 3
"""So many matrices at most are multiplied in one launch."""

SHARED_BLOCK_M = 32
"""Tiles of so many tokens at most: products of more are long beside their launch, and kinds would halve the tile."""


@dataclass(frozen=True)
class Launch:
    """How a fused product is launched.

    Attributes:
        block_m: tokens of a tile, a power of two, 8 at least.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline; two of its stages follow the work table.
        programs: how many programs a launch should have; strips are cut into parts to get there.
    """

    block_m: int
    num_warps: int
    num_stages: int
    programs: int

    def parts(self, strips: int, items: int, matrices: int) -> int:
        """Programs for each strip, when ``matrices`` matrices of so many items are multiplied at once."""
        return max(1, min(ceil_div(items, strips), ceil_div(self.programs, strips * max(1, matrices))))

    def of_kinds(self, number: int) -> Launch:
        """This launch for a matrix of so many kinds of blocks.

        With more than one, each is a function, in which the matrix instructions of four warps wait for each other
        (sm_90) or do not compile (sm_100): tiles are halved then, and so are the warps.
        """
        if number < 2 or self.num_warps < 4:
            return self
        return replace(self, block_m=min(self.block_m, 32), num_warps=2)


@dataclass(frozen=True)
class Rule:
    """A range of sizes and what runs there.

    Attributes:
        op: ``linear`` or ``expert_linear``.
        max_tokens: largest number of tokens, or of tokens per expert.
        size: a key of ``SIZES``, or None for every matrix.
        launch: ``(block_m, num_warps, num_stages)`` of the fused kernel, None for decode-then-GEMM.
        programs: programs of a launch for each streaming multiprocessor; more cut a strip into more parts.
    """

    op: str
    max_tokens: int
    size: str | None
    launch: tuple[int, int, int] | None
    programs: int = PROGRAMS_PER_PROCESSOR


DEFAULT_RULES = (
    Rule(LINEAR, 8, None, (8, 1, 6)),
    Rule(LINEAR, 16, None, (16, 1, 6)),
    Rule(LINEAR, 32, None, (32, 2, 4)),
    Rule(LINEAR, 256, None, (64, 4, 4)),
    Rule(LINEAR, MAX_TOKENS, None, None),
    Rule(EXPERTS, 8, None, (8, 1, 6)),
    Rule(EXPERTS, 16, None, (16, 1, 6)),
    Rule(EXPERTS, 32, None, (32, 2, 4)),
    Rule(EXPERTS, MAX_TOKENS, None, (64, 4, 4)),
)


@dataclass(frozen=True)
class Choice:
    """What runs, with how it is launched, and why.

    Attributes:
        name: ``fused`` (one Triton kernel), ``dense`` (decode with Triton, multiply with the vendor's GEMM), or
            ``reference`` (torch).
    """

    name: str
    launch: Launch | None
    reason: str


def shares_launch(launch: Launch, kinds: Sequence[Sequence[int]]) -> bool:
    """Whether matrices of these kinds of blocks, with the same x, are multiplied in one launch.

    Not where a kernel of one or two kinds would become one of all: a program looks for each in turn, which takes a
    few microseconds, as much as the launches that are saved. Where one of the matrices mixes so many, it is no loss.
    """
    if not 1 < len(kinds) <= MAX_SHARED or launch.block_m > SHARED_BLOCK_M:
        return False
    together = _compiled_grids({kind for own in kinds for kind in own})
    return together <= max(MAX_EXACT, *(_compiled_grids(set(own)) for own in kinds))


def _compiled_grids(kinds: set[int]) -> int:
    return sum(kind < ANY_SPARSE for kind in compiled_kinds(tuple(sorted(kinds))))


def size_class(weights: int) -> str:
    """The class of a matrix of so many weights."""
    return next(name for name, limit in SIZES.items() if weights <= limit)


def choose(
    op: str,
    tokens: int,
    weights: int,
    dtype: torch.dtype,
    facts: DeviceFacts,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Choice:
    """The kernel of a product on a GPU.

    Args:
        op: ``linear`` or ``expert_linear``.
        tokens: rows of x; for experts, rows per expert, rounded up.
        weights: weights of one matrix.
        dtype: of x.
        rules: in the order they are tried; the last of an operator must fit everything.
    """
    if facts.reason:
        return Choice("reference", None, facts.reason)
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice(
            "dense", None, f"x is {str(dtype).removeprefix('torch.')}, which fused kernels do not take"
        )
    size = size_class(weights)
    rule = next(r for r in rules if r.op == op and tokens <= r.max_tokens and r.size in (None, size))
    limit = "" if rule.max_tokens == MAX_TOKENS else f", up to {rule.max_tokens} tokens"
    if rule.launch is None:
        return Choice("dense", None, f"{size} matrix, many tokens: decode bands, then GEMM{limit}")
    launch = Launch(*rule.launch, programs=rule.programs * facts.processors)
    return Choice("fused", launch, f"{size} matrix{limit}: decoded inside the product")
