"""Small models with adapters, and a count of what autograd saves in their training step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ciuic_hf.modules.packed import PackedModule
from ciuic_hf.runtime.saved import is_weight

GROUPED: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
LATENT = GROUPED | {
    "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "n_shared_experts": 2, "kv_lora_rank": 64,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 48},
    "deepseek_v2": LATENT | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v2 grouped": LATENT | {"q_lora_rank": 48, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT | {"q_lora_rank": 48},
    "deepseek_v3 equal widths": LATENT | {"q_lora_rank": 48, "v_head_dim": 48},
}


def save_model(root: Path, name: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Path:
    """A random model of MODELS in a directory of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **(MODELS[name] | more))
    path = root / f"{name}-{dtype}".replace(" ", "-")
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    return path


def adapted(path: Path, lora: dict[str, Any], attention: str = "sdpa", checkpointing: bool = False) -> Any:
    """The model at 4.25 bits with adapters."""
    import peft
    from transformers import AutoModelForCausalLM

    import ciuic_hf

    config = ciuic_hf.CiuicConfig(bits=4.25, policy="uniform")
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, attn_implementation=attention, dtype="auto"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = ciuic_hf.prepare_for_training(model, checkpointing)
        return peft.get_peft_model(prepared, peft.LoraConfig(task_type="CAUSAL_LM", **lora)).train()


def counted_nbytes(model: Any, ids: Tensor) -> int:
    """Bytes of the storages that autograd saves in a forward pass, each once; without weights and their tables."""
    tables = {
        table.untyped_storage()._cdata
        for module in model.modules()
        if isinstance(module, PackedModule)
        for name in module.packed_shapes
        for table in module.derived(name)
        if isinstance(table, Tensor)
    }
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if not is_weight(tensor) and storage not in tables and tensor.dim():
            saved.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
