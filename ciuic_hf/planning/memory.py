"""What a model takes beside its weights while it generates, from its config alone.

Sizes are of transformers' own attention and caches, for a prompt of the whole context in one forward pass:

* cache: for each layer and token ``kv_lora_rank + qk_rope_head_dim`` values with multi-head latent attention
  (arXiv 2405.04434, section 2.1), else ``2 * key-value heads * head size``; and one layer more, because a growing
  cache is copied. A sliding window is not taken into account.
* attention: queries, and keys and values of all heads at full length. MLA expands its whole history, twice over:
  the product of ``kv_b_proj``, and keys joined with their rotary part. Scores are never formed (flash attention).
* activations: residual, its normalised copy and the gate, up and product of the widest feed-forward part that is
  dense; of routed experts ``experts per token`` rows for each token.
* logits: of the last token of each sequence, once in the model's dtype and once in float32.
* workspace: one band of decoded weights (``ciuic_kernels.ops``), in float32 and in the model's dtype.
* slack: 2 % of all that for blocks that the allocator cannot use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ciuic_hf.errors import CiuicError

BAND_WEIGHTS = 4 << 20  # decoded at a time by the products
SLACK = 0.02
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)


def parse_size(value: int | str) -> int:
    """``"22GiB"``, ``"24GB"`` or a number of bytes -> bytes. Raises CiuicError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise CiuicError(
            f'memory must be a size such as "22GiB" or "24GB", or a number of bytes, got {value!r}.'
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class Footprint:
    """Bytes beside the weights, by purpose; see the module."""

    cache: int
    attention: int
    activations: int
    logits: int
    workspace: int
    slack: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def footprint(config: Mapping[str, Any], context: int, batch: int = 1, element_nbytes: int = 2) -> Footprint:
    """What generation needs at ``context`` tokens (prompt and answer together) in ``batch`` sequences.

    Args:
        config: a transformers config as a dictionary, of the language model.
        element_nbytes: of the dtype that the model computes in.

    Raises:
        CiuicError: for a context or batch below 1, or a config that is not of a language model.
    """
    for name, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CiuicError(f"{name} must be a positive integer, got {value!r}.")
    sizes = _Sizes(config)
    tokens, element = context * batch, element_nbytes
    cache = sizes.cached * tokens * element
    parts = {
        "cache": cache * (sizes.layers + 1),
        "attention": sizes.attention * tokens * element,
        "activations": sizes.activations * tokens * element,
        "logits": sizes.vocabulary * batch * (element + 4),
        "workspace": BAND_WEIGHTS * (element + 4),
    }
    return Footprint(**parts, slack=int(SLACK * sum(parts.values())))


def largest_fitting(config: Mapping[str, Any], room: int, element_nbytes: int, **fixed: int) -> int:
    """The longest context (``batch=`` given) or largest batch (``context=`` given) within ``room``, 0 when none is."""
    free = "context" if "batch" in fixed else "batch"

    def fits(value: int) -> bool:
        return footprint(config, **fixed, **{free: value}, element_nbytes=element_nbytes).total <= room

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Sizes:
    """Values for each token, from the fields of a config.

    Attributes:
        cached: of one layer's cache.
        attention, activations: alive at the worst moment of a layer.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        try:
            self.layers, hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
            heads, self.vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
        except (KeyError, TypeError):
            raise CiuicError(
                f"The memory of a {config.get('model_type', 'model')} cannot be planned: its config lacks hidden_size, "
                "num_hidden_layers, num_attention_heads or vocab_size; use bits instead."
            ) from None
        if config.get("kv_lora_rank"):
            nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
            value = config["v_head_dim"]
            self.cached = config["kv_lora_rank"] + rope
            query = heads * (nope + rope)
            self.attention = 2 * query + heads * (nope + value) + heads * (nope + rope) + 2 * heads * value
        else:
            head = config.get("head_dim") or hidden // heads
            shared = config.get("num_key_value_heads") or heads
            self.cached = 2 * shared * head
            self.attention = 2 * heads * head + 2 * heads * head + heads * head
        routed = (config.get("num_experts_per_tok") or 0) * (config.get("moe_intermediate_size") or 0)
        dense = config.get("intermediate_size") or 4 * hidden
        experts_out = (config.get("num_experts_per_tok") or 0) * hidden if routed else 0
        self.activations = 3 * hidden + max(3 * dense, 3 * routed + 2 * experts_out)
