"""A second reader of grid records, written from the byte diagram alone: scalar Python on bytes."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
import torch

from ciuic_kernels.codecs.grid import GRIDS, LINEAR, MAX_EXPONENT, PLANES, GridCodec
from tests.kernels.samples import weights

each_grid = pytest.mark.parametrize("codec", GRIDS.values(), ids=lambda codec: codec.name)


def rounded(value: Fraction | float) -> float:
    """To the nearest float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def read_code(record: bytes, codec: GridCodec, rows: int, cols: int, row: int, col: int) -> int:
    start = shift = code = 0
    for width in PLANES[codec.width]:
        words, tile_cols = (cols * width + 15) // 16, 128 // width
        tile = col // tile_cols
        tile_words = min(8, words - 8 * tile)
        j, w = divmod(col - tile * tile_cols, tile_words)
        at = start + 2 * (8 * tile * rows + row * tile_words + w)
        word = record[at] | record[at + 1] << 8
        code |= (word >> (4 * (j % 4) + width * (j // 4)) & ((1 << width) - 1)) << shift
        start, shift = start + 2 * rows * words, shift + width
    return code


def read_scale(
    record: bytes, exponent: int, codec: GridCodec, rows: int, cols: int, row: int, col: int
) -> float:
    groups = -(-cols // codec.group)
    return scale_of(record[len(record) - rows * groups + row * groups + col // codec.group], exponent)


def scale_of(byte: int, exponent: int) -> float:
    sign, e, m = byte & 1, byte >> 5, byte >> 1 & 15
    return (-1) ** sign * (1 + m / 16 + sign / 32) * 2.0 ** (exponent + e - 127)


def read_weight(code: int, scale: float, bits: int) -> float:
    """The formula of the format, each step rounded to float32."""
    half = 1 << (bits - 1)
    t = (code - half) / half
    level = rounded(t * rounded(LINEAR[bits] + rounded(t * t)))
    return rounded(scale * level)


@each_grid
@pytest.mark.parametrize(("rows", "cols"), [(2, 128), (3, 64), (3, 100), (2, 65), (2, 37), (1, 1)])
def test_decode_follows_the_byte_diagram(codec: GridCodec, rows: int, cols: int) -> None:
    records, exponents = codec.encode(weights((1, rows, cols), 3, "heavy"))
    record, exponent = bytes(records[0].tolist()), int(exponents[0])
    expected = [
        [
            read_weight(
                read_code(record, codec, rows, cols, r, c),
                read_scale(record, exponent, codec, rows, cols, r, c),
                codec.width,
            )
            for c in range(cols)
        ]
        for r in range(rows)
    ]
    assert codec.decode(records, exponents, rows, cols)[0].tolist() == expected


@each_grid
def test_every_byte_decodes_to_a_finite_weight(codec: GridCodec) -> None:
    """No record needs checking before it is decoded: only the exponent byte has a range."""
    records = torch.randint(256, (8, codec.record_nbytes(16, 128)), dtype=torch.uint8)
    for exponent in (0, 1, 127, MAX_EXPONENT):
        exponents = torch.full((8,), exponent, dtype=torch.uint8)
        assert codec.decode(records, exponents, 16, 128).isfinite().all()
