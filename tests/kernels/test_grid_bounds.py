"""How far a grid codec may move a weight, derived from the grid and the scales that the encoder tries.

A scale s reaches to r = (1 + LINEAR) s, the outermost level. Let a be the largest magnitude of a group, S the smallest
of the scales of its sign whose reach R is not below a, and d the offset of the scale that was chosen, in steps from S.
Scales are ``(1 + m / 16) 2^e``, negative ones ``(1 + m / 16 + 1 / 32) 2^e``, so a <= R < 17/16 a, and the widest steps
of a scale are from m = 0, so that 16 / (16 - min d) a <= r <= (17 + max d) / 16 a. A group so far below the largest
weight of its block that no scale byte reaches it gets the block's smallest scale instead.

A weight inside the grid moves by at most half of its widest step. One beyond its last level (which is below r, as
t = 1 is no code) or beyond r (when r < a) moves by what it is beyond.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ciuic_kernels.codecs.grid import GRIDS, LINEAR, PLANES, SCALE_OFFSETS, GridCodec, levels, thresholds
from ciuic_kernels.format import ceil_div
from tests.kernels.samples import blocks

SLACK = 1 + 2.0**-20  # the float32 roundings of scale, level and their product
each_grid = pytest.mark.parametrize("codec", GRIDS.values(), ids=lambda codec: codec.name)
each_width = pytest.mark.parametrize("bits", PLANES)


def shape(bits: int) -> Tensor:
    """float32 ``[2^bits]``: the levels in units of the reach, from -1."""
    return levels(bits) / -levels(bits)[0]


def half_step(bits: int) -> float:
    return float(shape(bits).diff().max()) / 2


def move(bits: int) -> float:
    """Largest move of a weight of magnitude <= r, in units of r."""
    return max(half_step(bits), 1 - float(shape(bits)[-1]))


def clipped(bits: int) -> float:
    """Largest part of a by which r may be smaller."""
    down = -min(SCALE_OFFSETS[bits])
    return down / (16 + down)


def smallest_reach(bits: int, exponents: Tensor) -> Tensor:
    """Of every block, as ``[B, 1, 1]``: with a negative scale, whose smallest mantissa is 1 + 1 / 32."""
    return 33 / 32 * (1 + LINEAR[bits]) * torch.pow(2.0, exponents.double() - 127)[:, None, None]


def largest_reach(bits: int, absmax: Tensor, exponents: Tensor) -> Tensor:
    """Upper bound of the reach of every group; ``absmax`` is ``[B, rows, groups]``."""
    up = max(0, *SCALE_OFFSETS[bits])
    return torch.maximum((17 + up) / 16 * absmax.double(), (16 + up) / 16 * smallest_reach(bits, exponents))


def grouped(codec: GridCodec, batch: Tensor) -> Tensor:
    groups = ceil_div(batch.shape[-1], codec.group)
    padded = torch.nn.functional.pad(batch, (0, groups * codec.group - batch.shape[-1]))
    return padded.unflatten(-1, (groups, codec.group))


@each_width
def test_the_grid(bits: int) -> None:
    """Increasing, from -(1 + LINEAR), with an exact zero, and finest there."""
    grid, half = levels(bits), 1 << (bits - 1)
    assert grid[0] == -(1 + LINEAR[bits]) and grid[half] == 0 and len(grid) == 2 * half
    assert (grid.diff() > 0).all()
    assert torch.equal(grid[1:half], -grid[half + 1 :].flip(0))
    steps = grid[half:].diff()
    assert (steps.diff() >= -1e-6).all()


@each_width
def test_levels_are_exact(bits: int) -> None:
    """No order of evaluation, and no fused step, can change a bit of them; kernels use bfloat16 constants."""
    half, linear = 1 << (bits - 1), torch.tensor(LINEAR[bits])
    assert linear.bfloat16().double() == LINEAR[bits]
    for code, level in enumerate(levels(bits).tolist()):
        t = Fraction(code - half, half)
        assert Fraction(level) == t * (Fraction(LINEAR[bits]) + t * t)


@each_width
def test_thresholds_are_far_enough_apart_for_the_compiled_search(bits: int) -> None:
    """It starts from a table of bins of 1/512 and makes one comparison."""
    assert (thresholds(bits).double().diff() > 1 / 512).all()


@each_width
def test_the_scale_that_clips_nothing_is_tried_first(bits: int) -> None:
    offsets = SCALE_OFFSETS[bits]
    assert offsets[0] == 0 and len(set(offsets)) == len(offsets) <= 8


@each_grid
@settings(max_examples=20)
@given(batch=blocks())
def test_no_weight_moves_further_than_the_grid_allows(codec: GridCodec, batch: Tensor) -> None:
    records, exponents = codec.encode(batch)
    error = (grouped(codec, codec.decode(records, exponents, *batch.shape[1:])) - grouped(codec, batch)).abs()
    absmax = grouped(codec, batch).abs().amax(-1).double()
    bits = codec.width
    below = (clipped(bits) + move(bits) * (1 - clipped(bits))) * absmax
    allowed = torch.maximum(below, move(bits) * largest_reach(bits, absmax, exponents))
    assert (error.double().amax(-1) <= allowed * SLACK).all()


@each_grid
@settings(max_examples=20)
@given(batch=blocks())
def test_the_search_never_loses_to_the_scale_that_clips_nothing(codec: GridCodec, batch: Tensor) -> None:
    """The squared error of a group is at most what rounding to the unclipped grid may cost."""
    records, exponents = codec.encode(batch)
    error = grouped(codec, codec.decode(records, exponents, *batch.shape[1:])) - grouped(codec, batch)
    absmax = grouped(codec, batch).abs().amax(-1).double()
    worst = move(codec.width) * torch.maximum(17 / 16 * absmax, smallest_reach(codec.width, exponents))
    assert (error.double().square().mean(-1) <= worst.square() * SLACK).all()


@each_grid
@settings(max_examples=20)
@given(batch=blocks(kinds=("gaussian", "heavy", "integers", "constant")))
def test_the_largest_weight_of_every_group_survives(codec: GridCodec, batch: Tensor) -> None:
    """It sits at t = -1, where the grid ends: it loses what the scale gave up, or rounds by half a step."""
    records, exponents = codec.encode(batch)
    before = grouped(codec, batch)
    after = grouped(codec, codec.decode(records, exponents, *batch.shape[1:]))
    absmax = before.abs().amax(-1, keepdim=True)
    # Of two weights +a and -a one anchors the group: the nearer one counts.
    relative = ((after - before).abs() / absmax).masked_fill(before.abs() < absmax, float("inf")).amin(-1)
    in_range = absmax.squeeze(-1) >= smallest_reach(codec.width, exponents)
    up = max(0, *SCALE_OFFSETS[codec.width])
    allowed = max(clipped(codec.width), half_step(codec.width) * (17 + up) / 16)
    assert (relative[in_range] <= allowed * SLACK).all()
