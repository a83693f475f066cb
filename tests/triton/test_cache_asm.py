"""The PTX that unpacks codes of the cache, executed bit by bit, gives their levels in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ciuic_hf.runtime.cache.codes import pack
from ciuic_kernels.cache_codes import LLOYD
from ciuic_kernels.triton import _cache_asm
from tests.triton import ptx

FORMS = [
    pytest.param(
        *key,
        id=f"{key[0]} bits, {'channels' if key[1] else 'scaled tokens' if key[3] else 'tokens'}, "
        f"{'fp16' if key[2] else 'bf16'}",
    )
    for key in _cache_asm.UNPACK
]
WORDS = {8: "<u4", 4: "<u4", 2: "<u2", 1: "u1"}


@pytest.mark.parametrize(("bits", "channels", "half", "scaled"), FORMS)
def test_unpack_gives_the_levels(bits: int, channels: bool, half: bool, scaled: bool) -> None:
    """Every code in every place, beside others; scaled, their products rounded once."""
    count = 1 << bits
    codes = (np.arange(count)[:, None] * 5 + np.arange(8) * 3 + np.arange(64)[:, None, None] * 7) % count
    codes = codes.reshape(-1, 8).astype(np.uint8)
    planes = pack(torch.from_numpy(codes), bits)
    words = [p.numpy().view(WORDS[p.shape[1]])[:, 0].astype(np.uint32) for p in planes]
    text, registers = _cache_asm.unpack(bits, channels, half, scaled)
    dtype, places = torch.float16 if half else torch.bfloat16, 2 * len(registers)
    scales = torch.rand(len(codes)).add(0.01).to(dtype)
    bytes_ = scales.view(torch.int16).numpy().astype(np.uint32)
    inputs = {f"r{places}": words[0], f"r{places + 1}": words[-1], f"r{places + 2}": bytes_}
    values, _ = ptx.run(text, **inputs)
    got = np.concatenate([ptx.halves(values[name], half) for name in registers], axis=1)
    levels = torch.arange(count) - count / 2
    if not channels:
        levels = torch.tensor(
            [*range(128), *range(-128, 0)] if bits == 8 else [*LLOYD[bits], *(-x for x in LLOYD[bits])]
        )
    expected = levels.to(dtype)[torch.from_numpy(codes[:, :places]).long()]
    if scaled:
        expected = expected * scales[:, None]
    assert np.array_equal(got, expected.double().numpy())


def test_the_text_has_all_outputs() -> None:
    for (bits, *_), text in _cache_asm.UNPACK.items():
        assert all(text.count(f"${i},") + text.count(f"${i}}}") == 1 for i in range(4 if bits == 8 else 8))
