"""The three model shapes of this package: the published demo, the test model and the benchmark model.

All are DeepSeek-V3 (arXiv 2412.19437, section 2): multi-head latent attention with a split into rotary and
non-rotary parts, a first dense layer, then mixture-of-experts layers with grouped top-k routing and a shared
expert. Many dimensions are deliberately not multiples of 64 or 128, as `kv_a_proj_with_mqa` (576 rows) is not
in the original, so that partial blocks at the edges are always exercised.
"""

from __future__ import annotations

from typing import Any

BOS_TOKEN = "<|bos|>"
EOS_TOKEN = "<|eos|>"
BOS_ID = 0
EOS_ID = 1

CHECKPOINT_NAME = "checkpoint.safetensors"  # what training leaves for publishing

_COMMON: dict[str, Any] = {
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

# 3.9 M parameters.
DEMO_CONFIG: dict[str, Any] = _COMMON | {
    "vocab_size": 2048,
    "hidden_size": 224,
    "intermediate_size": 480,
    "moe_intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "n_routed_experts": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "max_position_embeddings": 1024,
}

# About half a million parameters, every matrix ragged in at least one dimension.
TINY_CONFIG: dict[str, Any] = _COMMON | {
    "vocab_size": 320,
    "hidden_size": 144,
    "intermediate_size": 208,
    "moe_intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 56,
    "kv_lora_rank": 40,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
}

# 640 M parameters, for benchmarks: large enough that memory and load time are measurable.
BENCHMARK_CONFIG: dict[str, Any] = _COMMON | {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 48,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 6,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 4096,
}
