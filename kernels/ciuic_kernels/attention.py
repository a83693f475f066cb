"""Whether the fused kernel attends to a packed cache, and with which launch: a pure function of sizes and device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ciuic_kernels.device import DeviceFacts
from ciuic_kernels.format import ceil_div

MAX_QUERIES = 8
"""New tokens up to which a step is decoding: more are attended to tile by tile, where a GEMM pays."""

WARPS_PER_PROCESSOR = 16
"""What a launch fills a multiprocessor with, twice what its registers hold at a time."""
MAX_SPLITS = 128
HEAD_WIDTH, LATENT_WIDTH = 128, 512
"""Largest width of a key or value, and of a latent."""


@dataclass(frozen=True)
class AttentionShape:
    """What attention to packed pages depends on.

    Attributes:
        batch: sequences; ``heads``: of the cache.
        rows: queries of one head of the cache, ``heads of the model / heads of the cache * new tokens``.
        queries: new tokens.
        key_width, value_width: of latents their rank and the width of the rotary part.
        key_group, value_group: of the formats: tokens, and channels; of latents channels, and tokens.
        tokens: that all pages have room for.
        latent: whether latents are attended to.
    """

    batch: int
    heads: int
    rows: int
    queries: int
    key_width: int
    value_width: int
    key_group: int
    value_group: int
    tokens: int
    latent: bool


@dataclass(frozen=True)
class AttentionLaunch:
    """How it is launched.

    Attributes:
        block_m: queries of a program, a power of two.
        block_t: tokens of a tile.
        num_warps, num_stages: of Triton.
        splits: programs that share the tokens of one head of one sequence.
    """

    block_m: int
    block_t: int
    num_warps: int
    num_stages: int
    splits: int


@dataclass(frozen=True)
class AttentionChoice:
    """``fused`` with a launch, or ``tiles`` (torch operations), and why."""

    name: str
    launch: AttentionLaunch | None
    reason: str


def power_of_two(number: int) -> int:
    """The least that is not below ``number``."""
    return 1 << max(0, number - 1).bit_length()


def block_width(width: int) -> int:
    """Channels that a program holds: a power of two, and the 16 that a matrix instruction takes."""
    return max(16, power_of_two(width))


def choose_attention(shape: AttentionShape, dtype: torch.dtype, facts: DeviceFacts) -> AttentionChoice:
    """What attends to packed pages."""
    refusal = facts.reason or _refusal(shape, dtype)
    if refusal:
        return AttentionChoice("tiles", None, refusal)
    launch = launch_of(shape, facts.processors)
    return AttentionChoice(
        "fused",
        launch,
        f"{shape.queries} new tokens: {launch.block_m} queries x {launch.block_t} tokens, {launch.splits} splits",
    )


def _refusal(shape: AttentionShape, dtype: torch.dtype) -> str:
    """Why the kernel does not serve a shape; empty when it does."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"queries are {str(dtype).removeprefix('torch.')}, which the fused kernel does not take"
    if shape.queries > MAX_QUERIES:
        return f"the fused kernel is for up to {MAX_QUERIES} new tokens"
    most, widest = LATENT_WIDTH if shape.latent else HEAD_WIDTH, max(shape.key_width, shape.value_width)
    if widest > most:
        return f"{'latents' if shape.latent else 'heads'} of {widest}, the fused kernel is for up to {most}"
    channels, tokens = shape.value_group, shape.key_group
    if shape.latent:
        channels, tokens = tokens, channels
    if channels != power_of_two(channels) or channels < 8:
        return f"groups of {channels} channels, the fused kernel is for powers of two from 8 up"
    if tokens % 16 or (not shape.latent and tokens % 32):
        return f"groups of {tokens} tokens, the fused kernel is for multiples of {16 if shape.latent else 32}"
    return ""


LATENT_TILES = ((16, 32, 4, 2), (32, 32, 8, 2))
"""Queries, tokens, warps and stages of what a launch for latents is chosen from. Queries of a tile share what is
decoded; more than 32 leave too few registers, as their sums are 512 wide (docs/adr/025)."""


def launch_of(shape: AttentionShape, processors: int) -> AttentionLaunch:
    """The launch of a shape that the kernel serves."""
    if shape.latent:
        fitting = (tile for tile in LATENT_TILES if tile[0] >= shape.rows)
        block_m, block_t, warps, stages = next(fitting, LATENT_TILES[-1])
    else:
        block_m, block_t, warps, stages = 16, largest_tile(shape.key_group), 4, 3
    programs = shape.batch * shape.heads * ceil_div(shape.rows, block_m)
    tiles = max(1, ceil_div(shape.tokens, block_t))
    splits = ceil_div(WARPS_PER_PROCESSOR // warps * processors, max(1, programs))
    return AttentionLaunch(block_m, block_t, warps, stages, min(max(1, splits), tiles, MAX_SPLITS))


def largest_tile(group: int) -> int:
    """Tokens of a tile within a group of tokens that share a scale."""
    return next(tile for tile in (128, 64, 32) if group % tile == 0)
