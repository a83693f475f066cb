"""Attention of one new token to a page that nobody has written: what has its kernels compiled ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ciuic_hf.planning.cache_formats import CHUNK, CacheSizes, cache_formats
from ciuic_hf.runtime.cache import fused
from ciuic_hf.runtime.cache.encoding import empty_record
from ciuic_hf.runtime.cache.pages import PageTables
from ciuic_hf.runtime.cache.store import Segment
from ciuic_kernels.attention import AttentionShape


@dataclass(frozen=True)
class CachedAttention:
    """What the layers of a model attend to.

    Attributes:
        heads: of the queries.
        bits: of the cache.
    """

    sizes: CacheSizes
    heads: int
    bits: int

    @classmethod
    def of(cls, config: Mapping[str, Any], bits: int) -> CachedAttention:
        """From a transformers config as a dictionary, of the language model. Raises CiuicError."""
        return cls(CacheSizes.of(config), int(config["num_attention_heads"]), bits)

    def shape(self, queries: int, tokens: int) -> AttentionShape:
        """Of ``queries`` new tokens of one sequence after ``tokens`` packed ones."""
        sizes = self.sizes
        formats = cache_formats(self.bits, sizes.latent)
        return AttentionShape(
            batch=1,
            heads=sizes.heads,
            rows=self.heads // sizes.heads * queries,
            queries=queries,
            key_width=sizes.key_width,
            value_width=sizes.value_width,
            key_group=formats.keys.group,
            value_group=formats.values.group,
            tokens=tokens,
            latent=sizes.latent,
        )

    def rehearse(self, dtype: torch.dtype, device: torch.device) -> None:
        """Attend to one page in place, with a mask and without, where the kernel serves; results are of no use.

        Caches that grow and caches of fixed length have pages of one size, and so the same kernels.
        """
        sizes = self.sizes
        formats = cache_formats(self.bits, sizes.latent)
        cached = [
            torch.zeros(1, sizes.heads, 1, width, dtype=dtype, device=device)
            for width in (sizes.key_width, sizes.value_width)
        ]
        records = [
            empty_record(x, CHUNK, fmt) for x, fmt in zip(cached, (formats.keys, formats.values), strict=True)
        ]
        segment = Segment(records[0], records[1], CHUNK)
        queries = [
            torch.zeros(1, self.heads, 1, width, dtype=dtype, device=device)
            for width in (sizes.key_width, sizes.value_width)
        ]
        rope = queries[1] if sizes.latent else None
        both = (cached[0], cached[1])
        if fused.choose_for(queries[0], formats, both, CHUNK, None, sizes.latent).launch is None:
            return
        table = PageTables().of([segment])
        for seen in (None, torch.ones(1, 1, CHUNK, dtype=torch.bool, device=device)):
            step = fused.Step(formats, table, seen, both, lambda scores: scores)
            fused.attend(queries[0], rope, step, 1.0)
