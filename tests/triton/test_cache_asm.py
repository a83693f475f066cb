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
        *key, id=f"{key[0]} bits, {'channels' if key[1] else 'tokens'}, {'fp16' if key[2] else 'bf16'}"
    )
    for key in _cache_asm.UNPACK
]
WORDS = {4: "<u4", 2: "<u2", 1: "u1"}


@pytest.mark.parametrize(("bits", "channels", "half"), FORMS)
def test_unpack_gives_the_levels(bits: int, channels: bool, half: bool) -> None:
    """Every code in every place, beside others."""
    count = 1 << bits
    codes = (np.arange(count)[:, None] * 5 + np.arange(8) * 3 + np.arange(64)[:, None, None] * 7) % count
    codes = codes.reshape(-1, 8).astype(np.uint8)
    planes = pack(torch.from_numpy(codes), bits)
    words = [p.numpy().view(WORDS[8 * p.shape[1] // 8])[:, 0].astype(np.uint32) for p in planes]
    text, registers = _cache_asm.unpack(bits, channels, half)
    values, _ = ptx.run(text, r8=words[0], r9=words[-1])
    got = np.concatenate([ptx.halves(values[name], half) for name in registers], axis=1)
    dtype = torch.float16 if half else torch.bfloat16
    levels = (
        torch.arange(count) - count / 2
        if channels
        else torch.tensor([*LLOYD[bits], *(-x for x in LLOYD[bits])])
    )
    assert np.array_equal(got, levels.to(dtype).double().numpy()[codes])


def test_the_text_has_all_outputs() -> None:
    for text in _cache_asm.UNPACK.values():
        assert all(text.count(f"${i},") + text.count(f"${i}}}") == 1 for i in range(8))
