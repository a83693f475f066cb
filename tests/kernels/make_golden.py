"""Writes the golden file: one fixed matrix in every codec that the tests sample.

    PYTHONPATH=kernels python -m tests.kernels.make_golden

A checkpoint that was written yesterday must load tomorrow: bytes that change for the same weights need a new
FORMAT_VERSION when old readers would decode them differently. Regenerating the file is right for a new codec, and
for an encoder that chooses other codes of the same format; for anything else bump the version.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ciuic_kernels import FORMAT_VERSION, BlockGrid
from ciuic_kernels.codec import Codec
from ciuic_kernels.packing import decode_tensor, encode_tensor
from tests.kernels.samples import SAMPLED

PATH = Path(__file__).parents[1] / "golden" / f"grid-v{FORMAT_VERSION}.safetensors"
SHAPE = (67, 211)  # four blocks: 64 and 3 rows, 128 and 83 columns; groups of 32 and 64 end raggedly


def golden_source() -> Tensor:
    """float16 ``[67, 211]``, bell-shaped, by integer arithmetic alone.

    Sums of four 9-bit numbers from a linear congruential generator, in 1024ths: float16 holds them exactly. A few
    rows, one outlier and a stretch of zeros leave the ordinary.
    """
    state, values = 12345, []
    for _ in range(SHAPE[0] * SHAPE[1]):
        total = 0
        for _ in range(4):
            state = (1103515245 * state + 12345) % (1 << 31)
            total += state >> 22
        values.append(total - 1022)
    source = torch.tensor(values, dtype=torch.float32).reshape(SHAPE) / 1024
    source[5] /= 64
    source[6] *= 8
    source[7, 40] = -30.0
    source[8, 10:150] = 0
    return source.half()


def encode_golden(codec: Codec) -> dict[str, Tensor]:
    """``<codec>.arena``, ``<codec>.tags`` and ``<codec>.digest`` of the golden matrix in one codec."""
    ids = torch.full(BlockGrid(SHAPE).tags_shape[:-1], codec.id, dtype=torch.uint8)
    packed = encode_tensor(golden_source(), ids)
    return {
        f"{codec.name}.arena": packed.arena,
        f"{codec.name}.tags": packed.tags,
        f"{codec.name}.digest": digest(decode_tensor(packed)),
    }


def digest(decoded: Tensor) -> Tensor:
    """One int64 that changes with any bit of the decoded float32 weights, or their order."""
    bits = decoded.view(torch.int32).flatten().long()
    return (bits * (2 * torch.arange(bits.numel()) + 1)).sum()[None]


def main() -> None:
    PATH.parent.mkdir(exist_ok=True)
    tensors = {name: value for codec in SAMPLED for name, value in encode_golden(codec).items()}
    save_file(tensors, PATH, metadata={"format_version": str(FORMAT_VERSION)})
    print(f"{PATH.name}: {len(SAMPLED)} codecs, {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
