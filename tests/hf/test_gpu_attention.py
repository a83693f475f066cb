"""Whole models that decode with the attention kernel, which Triton's interpreter runs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ciuic_hf import CiuicCache, use_ciuic_attention
from ciuic_hf.planning import cache_formats
from ciuic_hf.runtime.cache import fused, static_attention, static_store
from tests.triton.interpreted import gpu_kernels, needs_interpreter
from tests.triton.pages import LATENTS

pytestmark = needs_interpreter
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None, "max_new_tokens": 3}


def steps(
    model: Any, ids: Tensor, bits: int, mask: Tensor, new: int, forward: Any = None, room: int | None = None
) -> Tensor:
    """Logits of the last tokens, ``new`` at a time, after the others at once; steps by ``forward``."""
    cache, start = CiuicCache(model.config, bits, max_cache_len=room), ids.shape[1] - 2 * new
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    parts = []
    with torch.no_grad():
        for first, last in ((0, start), (start, start + new), (start + new, ids.shape[1])):
            out = (model if first == 0 or forward is None else forward)(
                ids[:, first:last], attention_mask=mask[:, :last], position_ids=positions[:, first:last],
                past_key_values=cache,
            )  # fmt: skip
            parts.append(out.logits)
    return torch.cat(parts[1:], 1)


@pytest.mark.parametrize(
    ("family", "bits", "new", "padded"),
    [
        ("qwen2_tied", 4, 1, False),
        pytest.param("v3_bf16", 4, 1, False, marks=pytest.mark.slow),
        pytest.param("qwen2_tied", 2, 3, True, marks=pytest.mark.slow),
        pytest.param("qwen2_tied", 8, 1, True, marks=pytest.mark.slow),
        pytest.param("v3_bf16", 8, 3, True, marks=pytest.mark.slow),
        pytest.param("v3_bf16", 3, 1, True, marks=pytest.mark.slow),
        pytest.param("v3_bf16", 2, 2, False, marks=pytest.mark.slow),
    ],
)
def test_kernel_and_tiles_give_the_same_logits(
    family: str,
    bits: int,
    new: int,
    padded: bool,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16; what they differ by is its rounding, through two layers."""
    monkeypatch.setitem(cache_formats._LATENTS, bits, LATENTS[bits])
    model = use_ciuic_attention(load(checkpoint(family), dtype=torch.float16))
    ids = torch.randint(2, 290, (2, 196))
    mask = torch.ones_like(ids)
    mask[0, : 40 if padded else 0] = 0
    tiles = steps(model, ids, bits, mask, new)
    calls = []
    packed = fused._packed
    monkeypatch.setattr(fused, "_packed", lambda *args: calls.append(1) or packed(*args))
    with gpu_kernels():
        kernel = steps(model, ids, bits, mask, new)
    assert len(calls) == 2 * model.config.num_hidden_layers
    real = mask[:, -2 * new :].bool()
    error = (kernel - tiles)[real].float().norm() / tiles[real].float().norm()
    assert error < 0.01 and kernel.isfinite().all()


@pytest.mark.parametrize(
    ("family", "bits", "compiles"),
    [
        ("qwen2_tied", 8, True),
        pytest.param("qwen2_tied", 4, False, marks=pytest.mark.slow),
        pytest.param("v3_bf16", 4, True, marks=pytest.mark.slow),
        pytest.param("v3_bf16", 2, False, marks=pytest.mark.slow),
    ],
)
def test_a_cache_of_fixed_length_gives_the_same_logits(
    family: str,
    bits: int,
    compiles: bool,
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float16, with padding, by counters that nothing reads; also where a step is one graph."""
    for module in (static_store, static_attention):
        monkeypatch.setattr(module, "can_be_read", lambda _: False)
    monkeypatch.setattr(static_attention, "compute_dtype", lambda like: like.dtype)  # as on a GPU
    model = use_ciuic_attention(load(checkpoint(family), dtype=torch.float16))
    ids = torch.randint(2, 290, (2, 170))
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    tiles = steps(model, ids, bits, mask, 1, room=300)
    calls, packed = [], fused._packed
    monkeypatch.setattr(fused, "_packed", lambda *args: calls.append(1) or packed(*args))
    forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiles else None
    with gpu_kernels():
        kernel = steps(model, ids, bits, mask, 1, forward, room=300)
    torch.compiler.reset()
    assert len(calls) == 2 * model.config.num_hidden_layers
    error = (kernel - tiles).float().norm() / tiles.float().norm()
    assert error < 0.01 and kernel.isfinite().all()


def test_generate_uses_it(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> None:
    model = load(checkpoint("qwen2_tied"), dtype=torch.float16)
    ids = torch.randint(2, 290, (1, 100))
    expected = model.generate(ids, past_key_values=CiuicCache(model.config, 8), **GREEDY)
    with gpu_kernels():
        assert torch.equal(
            model.generate(ids, past_key_values=CiuicCache(model.config, 8), **GREEDY), expected
        )
