"""The memory of one decode step at 32k tokens of latents, measured on the process."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from ciuic_hf import CiuicCache, use_ciuic_attention
from ciuic_hf.memory import PeakMemory, release_freed_memory

TOKENS = 32768


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_decode_step_at_32k_takes_weights_and_compressed_cache(bits: int) -> None:
    """DeepSeek-V3's own sizes of a head and of the latent, in 4 small layers with 16 heads."""
    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=16, first_k_dense_replace=4, q_lora_rank=512, max_position_embeddings=2 * TOKENS,
        n_routed_experts=8, n_group=1, topk_group=1,
    )  # fmt: skip
    model = use_ciuic_attention(DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval())
    cache = CiuicCache(config, bits)
    token = torch.tensor([[3]])
    with torch.no_grad():
        model(token, past_key_values=CiuicCache(config, bits))
        for layer in range(4):
            for _ in range(8):
                latent, rope = (torch.randn(1, 1, TOKENS // 8, n).bfloat16() for n in (512, 64))
                cache.update(latent, rope, layer)
        kept = sum(weight.nbytes for weight in model.parameters()) + cache.nbytes
        del latent, rope
        release_freed_memory()
        with PeakMemory() as peak:
            logits = model(token, past_key_values=cache).logits
    assert bool(logits.isfinite().all())
    assert peak.nbytes is not None and kept + peak.nbytes < 1.15 * kept
