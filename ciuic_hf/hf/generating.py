"""Lets ``generate`` and pipelines use a CiuicCache.

``GenerationMixin._prepare_cache_for_generation`` chooses the cache of a call and has no hook, so it is wrapped when the
first CiuicCache is made, which a load with ``cache_bits`` does: a model loaded so gets a CiuicCache where it would get
a DynamicCache, and a model that is given a CiuicCache is switched to the attention that reads it (docs/adr/018).
Nothing changes for others.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.generation.utils import GenerationMixin
from transformers.utils import logging

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import attention
from ciuic_hf.hf.cache import CiuicCache
from ciuic_hf.hf.config import CiuicConfig

logger = logging.get_logger(__name__)

CACHE = "past_key_values"


def cache_bits(model: Any) -> int | None:
    """What the model was loaded with."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config.cache_bits if isinstance(config, CiuicConfig) else None


def install() -> None:
    """Register the attention and wrap ``_prepare_cache_for_generation``, once."""
    original = GenerationMixin._prepare_cache_for_generation
    if getattr(original, "wrapped_by_ciuic", False):
        return
    attention.install()

    @wraps(original)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        bits = cache_bits(self)
        wanted = generation_config.cache_implementation in (None, "dynamic", "offloaded")
        if bits is not None and wanted and generation_config.use_cache and model_kwargs.get(CACHE) is None:
            offloading = generation_config.cache_implementation == "offloaded"
            model_kwargs[CACHE] = CiuicCache(self.config, bits, offloading=offloading)
            generation_config.cache_implementation = None
        if isinstance(model_kwargs.get(CACHE), CiuicCache):
            _use_attention(self)
        return original(self, generation_config, model_kwargs, *args, **kwargs)

    prepare.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    GenerationMixin._prepare_cache_for_generation = prepare


def _use_attention(model: Any) -> None:
    if not model._supports_default_dynamic_cache():
        raise CiuicError(
            f"{type(model).__name__} keeps a state of its own instead of a cache; use it without one."
        )
    chosen = model.config.get_text_config(decoder=True)._attn_implementation
    if chosen in ("sdpa", attention.NAME):
        attention.switch(model)
