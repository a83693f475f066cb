"""A decoder of checkpoint format v1 written from docs/checkpoint-format.md alone: numpy, no torch, no ciuic.

    python docs/reference_decoder.py CHECKPOINT_DIRECTORY [PARAMETER]

prints a few values of every compressed parameter, or of one.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
LINEAR = {2: 4.25, 3: 3.0, 4: 1.5, 5: 1.0, 6: 1.0, 8: 1.5}
ZERO, RAW_BF16, RAW_FP16 = 0, 1, 2
GRIDS = {group + width: (width, group) for group in (32, 64) for width in PLANES}
SPARSE = {128 + 20 * i + d - 1: (width, d) for i, width in enumerate(PLANES) for d in range(1, 21)}


def record_nbytes(codec, rows, cols):
    if codec == ZERO:
        return 0
    if codec in (RAW_BF16, RAW_FP16):
        return 2 * rows * cols
    if codec in SPARSE:
        width, d = SPARSE[codec]
        slots = -(-rows * cols * d // 32)
        return rows * (-(-cols // 8) + 1) + sum(-(-slots * p // 8) for p in PLANES[width])
    width, group = GRIDS[codec]  # KeyError: not a codec of version 1
    return rows * (sum(2 * -(-cols * p // 16) for p in PLANES[width]) + -(-cols // group))


def levels(width):
    half = np.float32(1 << (width - 1))
    t = (np.arange(1 << width, dtype=np.float32) - half) / half
    return t * (np.float32(LINEAR[width]) + t * t)


def decode_plane(plane, p, rows, cols):
    """plane: uint8 ``[2 rows ceil(cols p / 16)]`` -> int64 ``[rows, cols]``, the p bits of every code."""
    words, total = plane.view("<u2").astype(np.int64), -(-cols * p // 16)
    codes = np.empty((rows, total * 16 // p), np.int64)
    for first in range(0, total, 8):
        v = min(8, total - first)
        tile = words[rows * first : rows * (first + v)].reshape(rows, v)
        for j in range(16 // p):
            left = first * 16 // p + j * v
            codes[:, left : left + v] = tile >> (4 * (j % 4) + p * (j // 4)) & ((1 << p) - 1)
    return codes[:, :cols]


def scales(exponent, codes):
    """Block exponent byte and scale bytes -> float32."""
    codes = codes.astype(np.uint32)
    bits = (np.uint32(exponent) << np.uint32(23)) + (codes << np.uint32(18)) + (codes << np.uint32(31))
    return bits.view(np.float32)


def decode_sparse(width, d, exponent, record, rows, cols):
    slots, row_bytes = -(-rows * cols * d // 32), -(-cols // 8)
    bitmap = record[: rows * row_bytes].reshape(rows, row_bytes)
    row, col = np.nonzero(np.unpackbits(bitmap, axis=1, bitorder="little")[:, :cols])  # in row-major order
    row, col = row[:slots], col[:slots]  # a weight without a slot is 0
    start, shift, number = rows * row_bytes + rows, 0, np.arange(len(row))
    codes = np.zeros(len(row), np.int64)
    for p in PLANES[width]:
        fields = record[start:].astype(np.int64)[number * p // 8] >> (number * p % 8)
        codes |= (fields & ((1 << p) - 1)) << shift
        start, shift = start + -(-slots * p // 8), shift + p
    out = np.zeros((rows, cols), np.float32)
    out[row, col] = scales(exponent, record[rows * row_bytes :][:rows])[row] * levels(width)[codes]
    return out


def decode_block(codec, exponent, record, rows, cols):
    """record: uint8 ``[record_nbytes]`` -> float32 ``[rows, cols]``."""
    if codec == ZERO:
        return np.zeros((rows, cols), np.float32)
    if codec == RAW_BF16:
        return (record.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(rows, cols)
    if codec == RAW_FP16:
        return record.view("<f2").astype(np.float32).reshape(rows, cols)
    if codec in SPARSE:
        return decode_sparse(*SPARSE[codec], exponent, record, rows, cols)
    width, group = GRIDS[codec]
    codes, start, shift = np.zeros((rows, cols), np.int64), 0, 0
    for p in PLANES[width]:
        end = start + 2 * rows * -(-cols * p // 16)
        codes |= decode_plane(record[start:end], p, rows, cols) << shift
        start, shift = end, shift + p
    scale = scales(exponent, record[start:].reshape(rows, -1)[:, np.arange(cols) // group])
    return scale * levels(width)[codes]


def decode(arena, tags, shape):
    """arena uint8 ``[nbytes]``, tags uint8 ``[..., strips, kblocks, 2]``, shape from config.json -> float32."""
    rows, cols = shape[-2:]
    out, at = np.empty((tags.size // 2 // (-(-rows // 64) * -(-cols // 128)), rows, cols), np.float32), 0
    blocks = iter(tags.reshape(-1, 2).tolist())
    for matrix in out:
        for r in range(0, rows, 64):
            for k in range(0, cols, 128):
                (codec, exponent), view = next(blocks), matrix[r : r + 64, k : k + 128]
                n = record_nbytes(codec, *view.shape)
                view[:] = decode_block(codec, exponent, arena[at : at + n], *view.shape)
                at += -(-n // 16) * 16
    assert at == arena.size, "the tags do not add up to the arena"
    return out.reshape(shape)


def read_safetensors(path):
    raw = np.fromfile(path, np.uint8)
    (n,) = struct.unpack("<Q", raw[:8].tobytes())
    header = json.loads(raw[8 : 8 + n].tobytes())
    header.pop("__metadata__", None)
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] == "U8":
            yield name, raw[8 + n + begin : 8 + n + end].reshape(entry["shape"])


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    parameters = json.loads((directory / "config.json").read_text())["quantization_config"]["parameters"]
    tensors = dict(
        pair for file in sorted(directory.glob("*.safetensors")) for pair in read_safetensors(file)
    )
    for name in sys.argv[2:] or sorted(parameters.keys() & tensors.keys()):
        dense = decode(tensors[name], tensors[name + "_tags"], parameters[name]["shape"])
        print(name, list(dense.shape), dense.ravel()[:4])
