"""Packing of codes, one-byte scales and the Hadamard transform."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.runtime.cache.codes import (
    LLOYD,
    fold_sum,
    lloyd_codes,
    pack,
    rotate,
    scale_bytes,
    scale_table,
    unpack_linear,
    unpack_lloyd,
)

SEEDS = st.integers(0, 2**31)


@given(bits=st.sampled_from([2, 3, 4, 8]), eights=st.integers(1, 9), rows=st.integers(1, 5), seed=SEEDS)
def test_codes_come_back(bits: int, eights: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, 8 * eights), generator=generator, dtype=torch.uint8)
    planes = pack(codes, bits)
    assert sum(plane.nbytes for plane in planes) == codes.numel() * bits // 8
    assert torch.equal(unpack_linear(planes, bits), codes.float())
    if bits in LLOYD:
        levels = torch.tensor(LLOYD[bits])
        expected = torch.cat([levels, -levels])[codes.long()]
        assert torch.equal(unpack_lloyd(planes, bits), expected)


@pytest.mark.parametrize("bits", LLOYD)
def test_levels_are_centroids_of_a_normal_distribution(bits: int) -> None:
    """Each level is the mean of what is nearest to it, Max's condition, to the four digits that he gives."""
    levels = LLOYD[bits]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    for level, (low, high) in zip(levels, pairwise(edges), strict=True):
        mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        mean = (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi) / mass
        assert mean == pytest.approx(level, rel=1e-3)


@given(bits=st.sampled_from(sorted(LLOYD)), seed=SEEDS)
def test_the_nearest_level_is_taken(bits: int, seed: int) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    levels = torch.tensor(LLOYD[bits])
    levels = torch.cat([levels, -levels])
    chosen = unpack_lloyd(pack(lloyd_codes(x, bits), bits), bits)
    assert torch.equal((x - chosen).abs(), (x[:, None] - levels).abs().amin(-1))


@given(st.floats(0, 1700, width=32))
def test_a_scale_is_not_below_what_is_asked_and_less_than_an_eighth_octave_above(asked: float) -> None:
    byte = scale_bytes(torch.tensor([asked]))
    scale = float(scale_table(byte.device)[int(byte)])
    assert asked <= scale <= max(asked * 2 ** (1 / 8) * (1 + 1e-6), 2.0**-21)


@pytest.mark.parametrize("asked", [math.nan, math.inf, 1e9])
def test_a_scale_that_there_is_not_becomes_nan(asked: float) -> None:
    byte = scale_bytes(torch.tensor([asked]))
    assert torch.isnan(scale_table(byte.device)[byte.long()]).all()


@given(width=st.integers(1, 130), seed=SEEDS)
def test_rotating_keeps_lengths_and_rotating_twice_gives_back(width: int, seed: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = rotate(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotate(turned), x)


def test_rotating_spreads_one_channel_over_all() -> None:
    x = torch.zeros(64)
    x[5] = 8.0
    assert torch.equal(rotate(x).abs(), torch.ones(64))


@given(width=st.integers(1, 70), seed=SEEDS)
def test_fold_sum_is_a_sum(width: int, seed: int) -> None:
    x = torch.randn(4, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(fold_sum(x), x.sum(-1))
