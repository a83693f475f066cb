"""The PTX that unpacks weights and scales, executed bit by bit, gives the levels and scales of the codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ciuic_kernels.codecs.grid import (
    MAX_EXPONENT,
    MIN_EXPONENT,
    PLANES,
    levels,
    pack_plane,
    scale_values,
)
from ciuic_kernels.triton import _asm
from tests.triton import ptx

SEEDS = st.integers(0, 2**32 - 1)
FORMS = [
    pytest.param(*key, id=f"{key[0]}-group{key[1]}-{'fp16' if key[2] else 'bf16'}") for key in _asm.UNPACK
]
MANTISSA = {True: 10, False: 7}


def codes_of(width: int, seed: int) -> np.ndarray:
    """uint8 ``[2^k, 128]``: every code in every column, beside other neighbours in each."""
    starts = np.random.default_rng(seed).integers(0, 1 << width, (1, 128))
    return ((np.arange(1 << width)[:, None] * 2654435761 % (1 << width) + starts) % (1 << width)).astype(
        np.uint8
    )


def registers_of(codes: np.ndarray, width: int, group: int) -> dict[str, np.ndarray]:
    """``$4`` and ``$5`` for a group of 32 columns, uint32 ``[rows, 4]``: what ``load_planes`` gives the threads."""
    planes, shift, found = PLANES[width], 0, []
    for bits in planes:
        packed = pack_plane(torch.from_numpy((codes >> shift) & ((1 << bits) - 1)), bits).numpy()
        tiles = packed.view("<u4").reshape(bits, codes.shape[0], 4)
        found.append(tiles[group * bits // 4])
        shift += bits
    return {"r4": found[0], "r5": found[-1]}


def in_columns(registers: list[np.ndarray], half: bool) -> np.ndarray:
    """Code n of words 0..7, n = 0..3, as float64 ``[rows, 32]`` in the order of the columns."""
    return np.concatenate([ptx.halves(r, half).reshape(r.shape[0], 8) for r in registers], axis=1)


@pytest.mark.parametrize(("width", "group", "half"), FORMS)
@settings(max_examples=4)  # each has every code in every column; the seed only varies their neighbours
@given(seed=SEEDS)
def test_unpack_gives_the_levels(width: int, group: int, half: bool, seed: int) -> None:
    codes = codes_of(width, seed)
    wanted_codes = codes[:, 32 * group : 32 * (group + 1)].astype(np.int64)
    registers, squared = ptx.run(_asm.UNPACK[width, group, half], **registers_of(codes, width, group))

    middle = 1 << (width - 1)
    assert len(squared) == 4
    np.testing.assert_array_equal(in_columns(squared, half), (wanted_codes - middle) / middle)

    values = in_columns([registers[f"${n}"] for n in range(4)], half)
    exact = levels(width).numpy().astype(np.float64)[wanted_codes]
    assert np.all(values[wanted_codes == middle] == 0)
    with np.errstate(divide="ignore"):
        unit = np.exp2(np.floor(np.log2(np.abs(exact))) - MANTISSA[half])
    assert np.all(np.abs(values - exact) <= 2 * unit)


@pytest.mark.parametrize(("width", "part"), list(_asm.UNPACK_SCALED))
def test_unpack_scaled_gives_the_levels_times_the_scale(width: int, part: int) -> None:
    """Every code in every column, under every mantissa and sign of a scale: within the three roundings of ADR 031."""
    codes = codes_of(width, part)
    groups = (2 * part, 2 * part + 1)
    words = [registers_of(codes, width, group) for group in groups]
    exponents = torch.tensor([[120], [131]], dtype=torch.uint8)
    scales = scale_values(torch.arange(32, dtype=torch.uint8), exponents).numpy()[
        ..., None, None
    ]  # [2, 32, 1, 1]
    halves = (scales.view(np.uint32) >> 16) * np.uint32(0x10001)
    shape = (32, *words[0]["r4"].shape)
    operands = {f"r{8 + i}": np.broadcast_to(words[i]["r4"], shape) for i in range(2)}
    operands |= {f"r{10 + i}": np.broadcast_to(words[i]["r5"], shape) for i in range(2)}
    operands |= {f"r{12 + i}": np.broadcast_to(halves[i], shape) for i in range(2)}
    registers, squared = ptx.run(_asm.UNPACK_SCALED[width, part], **operands)

    middle = 1 << (width - 1)
    assert len(squared) == 8
    for i, group in enumerate(groups):
        wanted = codes[:, 32 * group : 32 * (group + 1)].astype(np.int64)
        for scale in range(32):
            t = in_columns([register[scale] for register in squared[4 * i : 4 * i + 4]], False)
            np.testing.assert_array_equal(t, (wanted - middle) / middle)
            values = in_columns([registers[f"${n}"][scale] for n in range(4 * i, 4 * i + 4)], False)
            exact = scales[i, scale].astype(np.float64) * levels(width).numpy().astype(np.float64)[wanted]
            assert np.all(np.abs(values - exact) <= 2.6 * 2.0**-8 * np.abs(exact))


@pytest.mark.parametrize(("first_byte", "rows"), _asm.SCALE_FORMS)
def test_scales_are_the_codecs_bit_for_bit(first_byte: int, rows: int) -> None:
    """All 256 bytes under every exponent that a file may have, in every place of a register."""
    exponents = np.arange(MIN_EXPONENT, MAX_EXPONENT + 1, dtype=np.uint8)[:, None]
    others = np.random.default_rng(0).integers(0, 256, (4, len(exponents), 256), dtype=np.uint32)
    places = [first_byte + row * (4 // rows) for row in range(rows)]
    for row, place in enumerate(places):
        others[place] = (np.arange(256) * (1 + 2 * row) + row) % 256
    word = others[0] | others[1] << 8 | others[2] << 16 | others[3] << 24
    shifted = np.broadcast_to(exponents.astype(np.uint32) << 23, word.shape)
    operands = {f"r{rows}": word} | {f"r{rows + 1 + i}": shifted for i in range(rows)}
    registers, _ = ptx.run(_asm.scales(first_byte, rows), **operands)
    for row, place in enumerate(places):
        codes = torch.from_numpy(others[place].astype(np.uint8))
        wanted = scale_values(codes, torch.from_numpy(exponents)).numpy()
        np.testing.assert_array_equal(registers[f"${row}"], wanted.view(np.uint32))


def test_the_two_roundings_are_needed() -> None:
    """The bound of two units is not idle: some level of eight bits is not reached within half a unit."""
    codes = codes_of(8, 0)
    registers, _ = ptx.run(_asm.UNPACK[8, 0, False], **registers_of(codes, 8, 0))
    values = in_columns([registers[f"${n}"] for n in range(4)], False)
    exact = levels(8).numpy().astype(np.float64)[codes[:, :32].astype(np.int64)]
    nearest = torch.from_numpy(exact).to(torch.bfloat16).double().numpy()
    assert (values != nearest).any()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lop3.b32 $0,$1,0x0F0F0F0F,0x43004300,0xEA;", (0x89ABCDEF & 0x0F0F0F0F) | 0x43004300),
        ("lop3.b32 $0,$1,0x12345678,0x33333333,0xE4;", (0x89ABCDEF & 0x33333333) | (0x12345678 & 0xCCCCCCCC)),
        ("prmt.b32 $0,$1,0,0x2444;", 0xAB000000),
        ("prmt.b32 $0,$1,0x11223344,0xB610;", 0xFF22CDEF),
        ("shr.s32 $0,$1,4;", 0xF89ABCDE),
        ("shr.b32 $0,$1,4;", 0x089ABCDE),
        ("mov.b32 $0,0x3F803F80; fma.rn.bf16x2 $0,$0,$0,$0;", 0x40004000),
        ("mov.b32 $0,0x3C013C01; fma.rn.f16x2 $0,$0,$0,$0;", 0x40024002),
    ],
)
def test_the_emulator_follows_the_ptx_manual(text: str, wanted: int) -> None:
    registers, _ = ptx.run("{ .reg .b32 t; " + text + " }", r1=np.array([0x89ABCDEF], np.uint32))
    assert f"{int(registers['$0'][0]):08X}" == f"{wanted:08X}"
