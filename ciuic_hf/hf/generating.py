"""Lets ``generate`` and pipelines use a CiuicCache.

``GenerationMixin._prepare_cache_for_generation`` chooses the cache of a call and has no hook, so it is wrapped when the
first CiuicCache is made, which a load with ``cache_bits`` does: a model loaded so gets a CiuicCache where it would get
a DynamicCache, one of fixed length where it would get a StaticCache, and a model that is given a CiuicCache is switched
to the attention that reads it (docs/adr/018). Nothing changes for others.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from transformers.generation.utils import GenerationMixin
from transformers.utils import logging

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import attention, prefill
from ciuic_hf.hf.cache import CiuicCache
from ciuic_hf.hf.cache_name import cache_name
from ciuic_hf.hf.config import CiuicConfig

logger = logging.get_logger(__name__)

DYNAMIC = (None, "dynamic", "offloaded")
STATIC = ("static", "offloaded_static")


def cache_bits(model: Any) -> int | None:
    """What the model was loaded with."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config.cache_bits if isinstance(config, CiuicConfig) else None


def install() -> None:
    """Register the attention and wrap ``_prepare_cache_for_generation`` and ``_prefill``, once."""
    original = GenerationMixin._prepare_cache_for_generation
    if getattr(original, "wrapped_by_ciuic", False):
        return
    attention.install()
    prefill.install()
    name = cache_name()

    @wraps(original)
    def prepare(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        bits, wanted = cache_bits(self), generation_config.cache_implementation
        if bits is not None and generation_config.use_cache and model_kwargs.get(name) is None:
            if wanted in DYNAMIC:
                model_kwargs[name] = CiuicCache(self.config, bits, offloading=wanted == "offloaded")
            elif wanted in STATIC:
                length = _static_length(self, generation_config, max_cache_length)
                model_kwargs[name] = CiuicCache(
                    self.config, bits, offloading=wanted == "offloaded_static", max_cache_len=length
                )
            if name in model_kwargs:
                generation_config.cache_implementation = None
        if isinstance(model_kwargs.get(name), CiuicCache):
            _use_attention(self)
        return original(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

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


def _static_length(model: Any, generation_config: Any, needed: int) -> int:
    """As transformers sizes a StaticCache: a later call with fewer tokens compiles nothing anew."""
    asked = getattr(generation_config, "max_cache_len", None) or 0
    length = max(needed, asked, getattr(model, "_previous_max_cache_length", 0))
    model._previous_max_cache_length = length
    return length
