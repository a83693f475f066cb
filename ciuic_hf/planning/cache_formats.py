"""How a compressed cache stores keys, values and latents, and what that takes, exactly.

Three facts decide the formats (measured in docs/adr/018): channels of keys keep their range from token to token, so
keys share a scale over a group of tokens (KIVI, arXiv 2402.02750); values and latents have outlier channels that a
Hadamard transform spreads, after which they are close to Gaussian and the Lloyd-Max levels fit; and keys need more
bits than values. Pure arithmetic: nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ciuic_hf.errors import CiuicError

CACHE_BITS = (8, 4, 3, 2)
TAIL = 32
"""Tokens that always stay in full precision; a group is packed when it lies before them."""
CHUNK = 512
"""Tokens that are allocated at a time."""
_COUNTERS_NBYTES = 16  # two int64 on the device, of a layer of a static cache


@dataclass(frozen=True)
class ChannelFormat:
    """Codes of one channel over ``group`` tokens share a scale and a lowest value: ``low + scale * code``.

    Bytes of a group of one channel: ``group * bits / 8`` of codes, one of scale, two of lowest value (float16).
    """

    bits: int
    group: int
    rotates = False

    def nbytes(self, tokens: int, width: int) -> int:
        """Of ``tokens`` (whole groups) of one head, ``width`` channels."""
        return width * (tokens * self.bits // 8 + 3 * (tokens // self.group))


@dataclass(frozen=True)
class TokenFormat:
    """Codes of ``width`` channels of one token share a scale: ``scale * level(code)``.

    At 8 bits levels are -127 to 127. Below, channels are rotated (Hadamard) first and levels are Lloyd-Max's for a
    normal distribution. Channels are padded to a multiple of 8; a group is narrower where that many are left.
    """

    bits: int
    group: int

    @property
    def rotates(self) -> bool:
        return self.bits < 8

    def nbytes(self, tokens: int, width: int) -> int:
        """Of ``tokens`` of one head, ``width`` channels."""
        return tokens * (padded(width) * self.bits // 8 + -(-width // self.group))


Format = ChannelFormat | TokenFormat


def padded(width: int) -> int:
    """Channels as they are stored: bytes hold up to eight codes."""
    return -(-width // 8) * 8


@dataclass(frozen=True)
class CacheFormats:
    """Formats of a layer. Of multi-head latent attention ``keys`` is the latent, ``values`` the rotary part."""

    keys: Format
    values: Format

    @property
    def group(self) -> int:
        """Tokens that are packed together."""
        return max(f.group if isinstance(f, ChannelFormat) else 8 for f in (self.keys, self.values))

    def nbytes(self, tokens: int, key_width: int, value_width: int) -> int:
        """Of ``tokens`` (whole groups) of one head."""
        return self.keys.nbytes(tokens, key_width) + self.values.nbytes(tokens, value_width)


_HEADS = {
    8: CacheFormats(ChannelFormat(8, 64), TokenFormat(8, 64)),
    4: CacheFormats(ChannelFormat(4, 64), TokenFormat(4, 128)),
    3: CacheFormats(ChannelFormat(4, 64), TokenFormat(2, 128)),
    2: CacheFormats(ChannelFormat(3, 128), TokenFormat(2, 128)),
}
_LATENTS = {
    8: CacheFormats(TokenFormat(8, 64), ChannelFormat(8, 64)),
    4: CacheFormats(TokenFormat(4, 128), ChannelFormat(8, 64)),
    3: CacheFormats(TokenFormat(3, 128), ChannelFormat(8, 128)),
    2: CacheFormats(TokenFormat(2, 32), ChannelFormat(4, 16)),
}


def check_cache_bits(bits: object) -> int:
    """``bits`` where a cache can be stored in them. Raises CiuicError."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in CACHE_BITS:
        raise CiuicError(f"A cache is stored at 8, 4, 3 or 2 bits, got {bits!r}.")
    return bits


def cache_formats(bits: int, latent: bool) -> CacheFormats:
    """The formats that ``bits`` stands for, of ordinary heads or of latents. Raises CiuicError."""
    return (_LATENTS if latent else _HEADS)[check_cache_bits(bits)]


@dataclass(frozen=True)
class CacheSizes:
    """What one layer caches for a token: ``heads`` times a key of ``key_width`` and a value of ``value_width``."""

    layers: int
    heads: int
    key_width: int
    value_width: int
    latent: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> CacheSizes:
        """From a transformers config as a dictionary, of the language model. Raises CiuicError."""
        try:
            layers, heads = int(config["num_hidden_layers"]), int(config["num_attention_heads"])
            if config.get("kv_lora_rank"):
                return cls(layers, 1, int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"]), True)
            width = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
            return cls(layers, int(config.get("num_key_value_heads") or heads), width, width, False)
        except (KeyError, TypeError):
            raise CiuicError(
                f"The cache of a {config.get('model_type', 'model')} cannot be sized: its config lacks hidden_size, "
                "num_hidden_layers or num_attention_heads."
            ) from None


def cache_nbytes_per_token(config: Mapping[str, Any], bits: int) -> float:
    """Bytes of one packed token of one sequence in all layers, scales counted.

    Exact; a fraction where a scale is shared by tokens. Layers with a sliding window are counted like the others.
    """
    sizes = CacheSizes.of(config)
    formats = cache_formats(bits, sizes.latent)
    of_group = formats.nbytes(formats.group, sizes.key_width, sizes.value_width)
    return sizes.layers * sizes.heads * of_group / formats.group


def static_pages(formats: CacheFormats, capacity: int) -> int:
    """Chunks that a static cache of ``capacity`` tokens has room for: as many as can ever be packed."""
    return -(-(max(0, capacity - TAIL) // formats.group * formats.group) // CHUNK)


def static_tail(formats: CacheFormats) -> int:
    """Tokens in full precision that a static cache has room for: the most that wait for their group."""
    return TAIL + formats.group - 1


def cache_nbytes(
    config: Mapping[str, Any],
    bits: int,
    context: int,
    batch: int = 1,
    element_nbytes: int = 2,
    static: bool = False,
) -> int:
    """Bytes that a cache of ``context`` tokens has allocated: packed tokens in whole chunks, and the tail.

    Args:
        element_nbytes: of the model's dtype, in which the tail stays.
        static: of a cache with ``max_cache_len=context``, from its first token on.
    """
    sizes = CacheSizes.of(config)
    formats = cache_formats(bits, sizes.latent)
    if static:
        of_head = static_pages(formats, context) * formats.nbytes(CHUNK, sizes.key_width, sizes.value_width)
        of_head += static_tail(formats) * (sizes.key_width + sizes.value_width) * element_nbytes
        return sizes.layers * (batch * sizes.heads * of_head + _COUNTERS_NBYTES)
    packed = max(0, context - TAIL) // formats.group * formats.group
    chunks = -(-packed // CHUNK)
    of_head = chunks * formats.nbytes(CHUNK, sizes.key_width, sizes.value_width)
    of_head += (context - packed) * (sizes.key_width + sizes.value_width) * element_nbytes
    return batch * sizes.layers * sizes.heads * of_head
