"""What `ciuic bench memory` runs: the model, and the pieces switched on one after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ciuic_hf.demo.config import DEMO_CONFIG

BATCH, LENGTH = 4, 512  # of the plain run, whose peak is the budget
NEW_TOKENS = 8
CHUNK_TOKENS = BATCH * LENGTH  # of a prompt that are in one forward pass, in every setting

# 38 M weights, nearly all in experts: weights are 45 % of the plain training step. In DeepSeek-V3 itself they are
# far more of it, so that compressing them frees more than here. The vocabulary is small because logits in float32
# are 5 % of activations in DeepSeek-V3. Keys are as wide as values: torch's attention on a CPU then forms no scores,
# as attention on a GPU does not.
MODEL: dict[str, Any] = DEMO_CONFIG | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 512,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 16384,
}


@dataclass(frozen=True)
class Setting:
    """One row of the table; 0 bits are plain bf16.

    Attributes:
        work: "train" or "generate".
        checkpointing: torch's gradient checkpointing, not a piece of Ciuic.
    """

    name: str
    work: str
    weight_bits: float = 0
    activation_bits: int = 0
    cache_bits: int = 0
    checkpointing: bool = False


def settings(checkpointing: bool = False) -> list[Setting]:
    """The rows in order; the first of each kind of work sets the budget.

    Args:
        checkpointing: also gradient checkpointing alone, and together with compressed weights.
    """
    plain = Setting("plain", "train")
    weights = replace(plain, name="weights at 4.25 bits", weight_bits=4.25)
    rows = [
        plain,
        weights,
        replace(weights, name="+ activations at 8 bits", activation_bits=8),
        replace(weights, name="+ activations at 4 bits", activation_bits=4),
        replace(weights, name="+ activations at 2 bits", activation_bits=2),
    ]
    if checkpointing:
        rows += [
            replace(plain, name="checkpointing alone", checkpointing=True),
            replace(weights, name="checkpointing, weights at 4.25 bits", checkpointing=True),
        ]
    generating = replace(weights, work="generate")
    return [
        *rows,
        Setting("plain", "generate"),
        generating,
        replace(generating, name="+ cache at 4 bits", cache_bits=4),
    ]
