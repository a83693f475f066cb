"""What a model takes beside its weights while it generates, from its config alone.

Sizes are of transformers' own attention and caches, for a prompt of the whole context in sequences of one length, in
one forward pass or in pieces (``prefill_chunk``): then everything but the cache is of one piece, and what attention
needs of history for it is in :mod:`ciuic_hf.planning.attending`. The peak is the cache plus whatever is largest at
one moment:

* cache: for each layer and token ``kv_lora_rank + qk_rope_head_dim`` values with multi-head latent attention
  (arXiv 2405.04434, section 2.1), else ``2 * key-value heads * head size``; DeepSeek-V3.2 keeps an indexer key as
  well. A sliding window is not taken into account. With ``cache_bits`` what a CiuicCache allocates, see
  :mod:`ciuic_hf.planning.cache_formats`.
* activations, while the feed-forward part gates: the embedding, the residual twice and its normalised copy, and of
  the widest dense part three times its width. Routed experts have a row for each token and expert of it. Some rows at
  a time are weighted in float32, to which a CPU copies them first.
* attention: by how much attention exceeds that. MLA expands its whole history: the product of ``kv_b_proj``, and keys
  joined with their rotary part. Which scores are formed depends on the path, see :data:`PATHS`. The indexer of
  V3.2 forms ``[tokens, heads, context]`` scores in float32, and expands its keys for every query. MLA on a
  compressed cache expands a tile at a time, or attends to latents, see :mod:`ciuic_hf.planning.tiles`.
* workspace: by how much a product that decodes a band of its weight exceeds both.
* logits: of the last token of each sequence, once in the model's dtype and once in float32.
* slack: 2 % of all that for blocks that the allocator cannot use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.attending import BAND_WEIGHTS, Piece, attention_nbytes, mask_nbytes
from ciuic_hf.planning.cache_formats import cache_nbytes, cache_nbytes_per_token

SLACK = 0.02
SUMMED = 1 << 23
"""Elements of routed experts' outputs whose weighted sum is formed at a time, in float32."""
PATHS = ("flash", "math", "eager", "tiled")
"""How attention is computed: without scores in memory; by torch's fallback, which forms them twice in float32 and
copies queries, keys and values to it; by transformers' eager code, which forms them in the model's dtype and in
float32 and repeats keys and values for every head; tile by tile on a compressed cache of latents."""

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
    activations: int
    attention: int
    workspace: int
    logits: int
    slack: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Run:
    """How a model generates.

    Attributes:
        element_nbytes: of the dtype that the model computes in.
        cache_bits: of a CiuicCache; None for transformers' own.
        device: ``"cuda"`` or ``"cpu"``.
        path: of :data:`PATHS`; None for what sdpa chooses on the device, or what reads a CiuicCache.
        prefill_chunk: tokens of each sequence that go through the model together; None for the whole prompt.
    """

    element_nbytes: int = 2
    cache_bits: int | None = None
    device: str = "cuda"
    path: str | None = None
    prefill_chunk: int | None = None

    def piece(self, context: int, batch: int) -> Piece:
        """The piece of a prompt of the whole context that takes most: a full one at its end."""
        return Piece(min(context, self.prefill_chunk or context), context, batch)

    def reads_tiles(self, sizes: Sizes) -> bool:
        """Whether a CiuicCache is read without decompressing the whole of it."""
        return self.cache_bits is not None and self.path_of(sizes) in ("flash", "tiled")

    def path_of(self, sizes: Sizes) -> str:
        """The path of attention: CPU kernels without scores need values as wide as keys."""
        if self.path is not None:
            return self.path
        if sizes.latent and self.cache_bits is not None:
            return "tiled"
        return "math" if self.device == "cpu" and sizes.key_width != sizes.value_width else "flash"


def footprint(config: Mapping[str, Any], context: int, batch: int = 1, run: Run | None = None) -> Footprint:
    """What generation needs at ``context`` tokens (prompt and answer together) in ``batch`` sequences.

    Args:
        config: a transformers config as a dictionary, of the language model.
        run: how; bfloat16 on a GPU unless given.

    Raises:
        CiuicError: for a context or batch below 1, or a config that is not of a language model.
    """
    for name, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CiuicError(f"{name} must be a positive integer, got {value!r}.")
    sizes, run = Sizes(config), run or Run()
    element, piece = run.element_nbytes, run.piece(context, batch)
    cache = element * sizes.cached * sizes.layers * piece.cached
    if run.cache_bits is not None:
        cache = cache_nbytes(config, run.cache_bits, context, batch, element)
        cache += element * sizes.index_width * sizes.layers * piece.cached
    mask, tokens = mask_nbytes(sizes, run, piece), piece.tokens
    activations = mask + sizes.feed_forward_nbytes(element, run.device, tokens)
    attention = mask + attention_nbytes(sizes, run, piece)
    product = mask + tokens * sizes.product_nbytes(element) + sizes.band_nbytes(element, run.device, tokens)
    parts = {
        "cache": cache,
        "activations": activations,
        "attention": max(0, attention - activations),
        "workspace": max(0, product - max(activations, attention)),
        "logits": sizes.vocabulary * batch * (element + 4),
    }
    return Footprint(**parts, slack=int(SLACK * sum(parts.values())))


def largest_fitting(
    config: Mapping[str, Any], room: int, run: Run | None = None, limit: int | None = None, **fixed: int
) -> int:
    """The longest context (``batch=`` given) or largest batch (``context=`` given) within ``room``, 0 when none is.

    Args:
        limit: no more than that, such as the longest context that the model was made for.
    """
    free = "context" if "batch" in fixed else "batch"
    return largest(lambda value: footprint(config, run=run, **fixed, **{free: value}).total <= room, limit)


def largest(fits: Callable[[int], bool], limit: int | None = None) -> int:
    """The largest number up to ``limit`` that fits, 0 when none does; whatever is below one that fits must fit too."""
    low, high = 0, 1
    while (limit is None or high <= limit) and fits(high):
        low, high = high, 2 * high
    if limit is not None:
        high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Sizes:
    """Values for each token, from the fields of a config.

    Attributes:
        cached: of one layer's cache.
        expanded: what MLA makes of one cached token in a layer.
        key_width, value_width: of one head.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        try:
            self.layers, self.hidden = int(config["num_hidden_layers"]), int(config["hidden_size"])
            self.heads, self.vocabulary = int(config["num_attention_heads"]), int(config["vocab_size"])
        except (KeyError, TypeError):
            raise CiuicError(
                f"The memory of a {config.get('model_type', 'model')} cannot be planned: its config lacks hidden_size, "
                "num_hidden_layers, num_attention_heads or vocab_size; use bits instead."
            ) from None
        self.latent = int(config.get("kv_lora_rank") or 0)
        self.rotary = int(config["qk_rope_head_dim"]) if self.latent else 0
        head = config.get("head_dim") or self.hidden // self.heads
        self.key_width = int(config["qk_nope_head_dim"] + self.rotary) if self.latent else int(head)
        self.value_width = int(config["v_head_dim"]) if self.latent else int(head)
        self.shared = int(config.get("num_key_value_heads") or self.heads)
        self.index_heads = int(config.get("index_n_heads") or 0)
        self.index_width = int(config.get("index_head_dim") or 0) if self.index_heads else 0
        kept = self.latent + self.rotary if self.latent else 2 * self.shared * self.key_width
        self.cached = kept + self.index_width
        joined = 2 * self.key_width - self.rotary + self.value_width
        self.expanded = self.heads * joined if self.latent else 0
        self.dense = int(config.get("intermediate_size") or 4 * self.hidden)
        self.routed = (
            int(config.get("num_experts_per_tok") or 0) if config.get("moe_intermediate_size") else 0
        )
        self.expert = int(config.get("moe_intermediate_size") or 0)

    def feed_forward_nbytes(self, element: int, device: str, tokens: int) -> int:
        """While the widest feed-forward part gates, forms the routed experts' outputs, or sums them."""
        rows, float32 = tokens * self.routed, 4
        copied = float32 if device == "cpu" and element < 4 else 0  # torch's, to multiply with weights
        formed = float32 if device == "cuda" else 0  # blocks of several codecs add up in float32
        dense = tokens * 3 * self.dense * element
        gating = rows * self.expert * max(4 * element, 2 * (element + formed))
        forming = rows * (self.expert * element + self.hidden * (element + formed))
        summing = (rows + tokens) * self.hidden * element
        summing += min(rows * self.hidden, SUMMED) * (float32 + copied)
        return tokens * 4 * self.hidden * element + max(dense, gating, forming, summing)

    def product_nbytes(self, element: int) -> int:
        """Of one token, while the second product of a dense part is formed."""
        return 4 * self.hidden * element + 2 * self.dense * element

    def step_nbytes(self, run: Run, context: int) -> float:
        """What the attention of one decoded token reads and writes at least: cache, and history that MLA expands."""
        element = run.element_nbytes
        expanded = 0 if run.path_of(self) == "tiled" else 2 * element * self.expanded
        if run.cache_bits is None:
            return self.layers * context * (element * self.cached + expanded)
        packed = cache_nbytes_per_token(self.config, run.cache_bits)
        return context * (packed + self.layers * (element * self.index_width + expanded))

    def band_nbytes(self, element: int, device: str, tokens: int) -> int:
        """The weights that a product decodes at a time; on a CPU also its result for them, which BLAS forms apart."""
        whole = self.dense * self.hidden
        weights = min(BAND_WEIGHTS[device], whole)
        result = element * tokens * (weights // self.hidden) if device == "cpu" and weights < whole else 0
        return element * weights + result
