"""Random DeepSeek-V3 models of any shape in the official file format, for tests and benchmarks.

The tensors are made, stored and forgotten one by one, so memory is bounded by one shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config

from ciuic_hf.demo.config import DEMO_CONFIG
from ciuic_hf.demo.official import stored_tensors, write_configs
from ciuic_hf.demo.shards import ShardWriter

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_STD = 0.02
_SIGMA = 0.3  # of the logarithm of the row and column scales
_OUTLIER_SHARE = 1e-5
_OUTLIER_GAIN = 16.0


def _attention_shapes(config: DeepseekV3Config, prefix: str) -> Shapes:
    """Multi-head latent attention: low-rank projections of queries and keys/values, a norm in between."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    query_dim = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.q_lora_rank is None:
        yield f"{prefix}.q_proj.weight", (query_dim, hidden)
    else:
        yield f"{prefix}.q_a_proj.weight", (config.q_lora_rank, hidden)
        yield f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,)
        yield f"{prefix}.q_b_proj.weight", (query_dim, config.q_lora_rank)
    yield f"{prefix}.kv_a_proj_with_mqa.weight", (config.kv_lora_rank + config.qk_rope_head_dim, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", (config.kv_lora_rank,)
    kv_dim = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield f"{prefix}.kv_b_proj.weight", (kv_dim, config.kv_lora_rank)
    yield f"{prefix}.o_proj.weight", (hidden, heads * config.v_head_dim)


def _mlp_shapes(prefix: str, hidden: int, intermediate: int) -> Shapes:
    """A SwiGLU block."""
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden)
    yield f"{prefix}.up_proj.weight", (intermediate, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, intermediate)


def _layer_shapes(config: DeepseekV3Config, layer: int) -> Shapes:
    """One decoder layer, dense below `first_k_dense_replace` and mixture-of-experts from there on."""
    prefix, hidden, expert_dim = f"model.layers.{layer}", config.hidden_size, config.moe_intermediate_size
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield from _attention_shapes(config, f"{prefix}.self_attn")
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    if layer < config.first_k_dense_replace:
        yield from _mlp_shapes(f"{prefix}.mlp", hidden, config.intermediate_size)
        return
    yield f"{prefix}.mlp.gate.weight", (config.n_routed_experts, hidden)
    yield f"{prefix}.mlp.gate.e_score_correction_bias", (config.n_routed_experts,)
    for expert in range(config.n_routed_experts):
        yield from _mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, expert_dim)
    yield from _mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, expert_dim * config.n_shared_experts)


def _mtp_shapes(config: DeepseekV3Config) -> Shapes:
    """The multi-token-prediction layer, kept after the last decoder layer (README_WEIGHTS.md)."""
    prefix, hidden = f"model.layers.{config.num_hidden_layers}", config.hidden_size
    yield f"{prefix}.embed_tokens.weight", (config.vocab_size, hidden)
    yield f"{prefix}.enorm.weight", (hidden,)
    yield f"{prefix}.hnorm.weight", (hidden,)
    yield f"{prefix}.eh_proj.weight", (hidden, 2 * hidden)
    yield from _layer_shapes(config, config.num_hidden_layers)
    yield f"{prefix}.shared_head.norm.weight", (hidden,)
    yield f"{prefix}.shared_head.head.weight", (config.vocab_size, hidden)


def official_shapes(config: DeepseekV3Config, *, mtp: bool = False) -> Shapes:
    """Yields (official name, shape) for every parameter, in the order of the model."""
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        yield from _layer_shapes(config, layer)
    if mtp:
        yield from _mtp_shapes(config)
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, config.hidden_size)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A random fp32 parameter of the kind that `name` says.

    A linear weight [N, K] is Gaussian with lognormal row and column scales and rare outliers: roughly what
    trained weights look like, and hard enough for a quantizer to matter.
    """
    noise = torch.randn(shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return noise.mul_(0.01)
    if len(shape) == 1:  # a norm's gain
        return noise.mul_(0.1).add_(1.0)
    noise.mul_(_STD)
    if name.endswith(("embed_tokens.weight", "head.weight", "mlp.gate.weight")):
        return noise
    rows, cols = shape
    noise.mul_(torch.randn((rows, 1), generator=generator).mul_(_SIGMA).exp_())
    noise.mul_(torch.randn((1, cols), generator=generator).mul_(_SIGMA).exp_())
    count = max(1, round(noise.numel() * _OUTLIER_SHARE))
    outliers = torch.randint(noise.numel(), (count,), generator=generator)
    noise.view(-1)[outliers] *= _OUTLIER_GAIN
    return noise


def random_deepseek_v3(
    out_dir: Path | str,
    *,
    fp8: bool,
    seed: int = 0,
    mtp: bool = False,
    ue8m0: bool = False,
    max_shard_size: int = 150_000_000,
    **config_overrides: Any,
) -> list[Path]:
    """Writes a random model; returns its files. The same seed gives the same weights in both formats.

    `config_overrides` are applied to `DEMO_CONFIG`; pass `**TINY_CONFIG` or `**BENCHMARK_CONFIG` for those
    shapes. There is no tokenizer. With `mtp`, a multi-token-prediction layer is added, which transformers
    does not load: it reports those tensors as unexpected.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = DeepseekV3Config(**(DEMO_CONFIG | config_overrides | {"num_nextn_predict_layers": int(mtp)}))
    generator = torch.Generator().manual_seed(seed)
    writer = ShardWriter(out_dir, max_shard_size)
    for name, shape in official_shapes(config, mtp=mtp):
        tensor = random_tensor(name, shape, generator)
        for stored_name, stored in stored_tensors(name, tensor, fp8=fp8, ue8m0=ue8m0):
            writer.add(stored_name, stored)
    write_configs(config, out_dir, fp8=fp8, ue8m0=ue8m0)
    return writer.close()
