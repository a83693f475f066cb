"""The official DeepSeek-V3 file format: tensor names, types and config.json.

Source: the files of deepseek-ai/DeepSeek-V3 and its README_WEIGHTS.md. Every linear layer and expert is
stored in FP8 with a companion `<name>_scale_inv`, except the embeddings, the output head, the router and the
projection `eh_proj` of the multi-token-prediction layer, which stay bf16, as do the norms; the router's
`e_score_correction_bias` is fp32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config

from ciuic_hf.demo.fp8 import BLOCK, quantize_fp8_block

# The fields of config.json that transformers' DeepseekV3Config holds under the same name.
_CONFIG_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "moe_intermediate_size",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_nextn_predict_layers",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "routed_scaling_factor",
    "tie_word_embeddings",
    "topk_group",
    "use_cache",
    "v_head_dim",
    "vocab_size",
)

BF16_MATRICES = ("embed_tokens.weight", "head.weight", "mlp.gate.weight", "eh_proj.weight")


def official_config(config: DeepseekV3Config, *, fp8: bool, ue8m0: bool = False) -> dict[str, Any]:
    """The content of config.json as DeepSeek publishes it, for a transformers configuration."""
    rope = dict(config.rope_parameters or {})
    rope_theta = rope.pop("rope_theta", 10000.0)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    published: dict[str, Any] = {name: getattr(config, name) for name in _CONFIG_FIELDS}
    published |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "ep_size": 1,
        "moe_layer_freq": 1,
        "rope_scaling": scaling,
        "rope_theta": rope_theta,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    }
    if fp8:
        quantization: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        if ue8m0:
            quantization["scale_fmt"] = "ue8m0"
        published["quantization_config"] = quantization
    return dict(sorted(published.items()))


def write_configs(config: DeepseekV3Config, out_dir: Path, *, fp8: bool, ue8m0: bool = False) -> None:
    """Writes config.json and generation_config.json (greedy by default)."""
    generation = {
        "_from_model_config": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }
    contents = {
        "config.json": official_config(config, fp8=fp8, ue8m0=ue8m0),
        "generation_config.json": generation,
    }
    for name, content in contents.items():
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def stored_as_fp8(name: str, tensor: torch.Tensor) -> bool:
    """Whether the official FP8 files hold this tensor in FP8."""
    return tensor.ndim == 2 and not name.endswith(BF16_MATRICES)


def stored_tensors(
    name: str, tensor: torch.Tensor, *, fp8: bool, ue8m0: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the (name, tensor) pairs that the files hold for one parameter of any floating type.

    FP8 is taken from the weight rounded to bf16, so that both formats of a model hold the same weights.
    """
    if name.endswith("e_score_correction_bias"):
        yield name, tensor.float()
        return
    rounded = tensor.to(torch.bfloat16)
    if fp8 and stored_as_fp8(name, tensor):
        weight, scale_inv = quantize_fp8_block(rounded, ue8m0=ue8m0)
        yield name, weight
        yield name + "_scale_inv", scale_inv
    else:
        yield name, rounded
