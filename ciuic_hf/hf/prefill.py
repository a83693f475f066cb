"""Prompts in pieces: which models take them, and ``generate`` doing it.

transformers feeds a prompt in pieces of ``generation_config.prefill_chunk_size``. That is set on a model that Ciuic
loads with ``prefill_chunk``; and ``GenerationMixin._prefill`` is wrapped, for what transformers refuses or leaves
out: a call without a cache and one with images or sound go in at once, and embeddings go in in pieces too. Pieces into
a CiuicCache of fixed length run as they are, whoever asked for pieces: transformers would compile them, and with them
the allocation of the cache, whose pages no kernel could be told the addresses of then.
"""

from __future__ import annotations

import copy
from functools import wraps
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.cache_name import cache_name
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.planning.prefill_chunk import AUTO

# Layers that go on from what is cached; the last is what transformers 5.17 calls those of DeepSeek-V3.2.
_CUTS = {"full_attention", "sliding_attention", "indexed_attention", "deepseek_sparse_attention"}


def why_whole(model: Any) -> str | None:
    """Why prompts of this model cannot go in in pieces, None when they can."""
    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{kind} is an encoder-decoder"
    if not hasattr(model, "generate") or not model.can_generate():
        return f"{type(model).__name__} does not generate"
    if not model._supports_default_dynamic_cache():
        return f"{kind} keeps a state of its own instead of a cache"
    if model.config.get_text_config(decoder=True) is not model.config:
        return f"{kind} takes more than text, which cannot be cut"
    try:
        names = get_layer_types_and_kwargs(model.config)[0]
    except (AttributeError, KeyError) as error:
        return f"no cache of transformers describes the layers of {kind} ({error})"
    odd = sorted(set(names) - _CUTS)
    return f"{kind} has layers of type {odd[0]}" if odd else None


def check(model: Any, config: CiuicConfig) -> None:
    """Raise CiuicError for a size of pieces where the model takes none."""
    reason = why_whole(model) if isinstance(config.prefill_chunk, int) else None
    if reason is not None:
        raise CiuicError(f"prefill_chunk={config.prefill_chunk} cannot be done: {reason}; leave it out.")


def describe(model: Any, config: CiuicConfig) -> str:
    """One sentence on how prompts go in where it was chosen or given, else nothing."""
    if config.prefill_chunk is not None:
        return f"Prompts go in in pieces of {config.prefill_chunk} tokens (generation_config.prefill_chunk_size)."
    reason = why_whole(model) if config.memory is not None else None
    return f"Prompts go in at once: {reason}." if reason else ""


def is_automatic(model: Any, config: CiuicConfig) -> bool:
    """Whether the size of pieces is to be chosen for a memory."""
    wanted = config.prefill_chunk == AUTO or (config.prefill_chunk is None and config.memory is not None)
    return wanted and why_whole(model) is None


def set_prefill_chunk(model: Any, config: CiuicConfig) -> None:
    """Have ``generate`` cut prompts as the config says, unless the user's generation config says otherwise."""
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    if generation.prefill_chunk_size in (None, config.replaced_prefill_chunk):
        generation.prefill_chunk_size = config.prefill_chunk
    if config.prefill_chunk is not None:
        install()


def install() -> None:
    """Wrap ``_prefill``, once. Models without a ``prefill_chunk`` of Ciuic's, or a CiuicCache, run as before."""
    from transformers.generation.utils import GenerationMixin

    original = GenerationMixin._prefill
    if getattr(original, "wrapped_by_ciuic", False):
        return

    # transformers 5.17 cuts all tokens of a conversation, those that are cached too: later turns go in at once there.
    goes_on = "prefill_ids" in original.__code__.co_varnames

    @wraps(original)
    def prefill(
        self: Any,
        input_ids: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        chunk = generation_config.prefill_chunk_size
        if chunk is not None and chunk == _chunk_of(self):
            embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
            cache = model_kwargs.get(cache_name())
            again = not goes_on and cache is not None and cache.get_seq_length() > 0
            if (
                cache is None
                or embeds is not None
                or again
                or _is_short(input_ids, chunk, cache, model_kwargs)
            ):
                generation_config = copy.copy(generation_config)
                generation_config.prefill_chunk_size = None
            if cache is not None and embeds is not None:
                _feed(self, embeds, chunk, model_kwargs)
        if generation_config.prefill_chunk_size is not None and _is_static(model_kwargs.get(cache_name())):
            generation_config = copy.copy(generation_config)
            generation_config.disable_compile = True
        return original(self, input_ids, generation_config, model_kwargs, is_first_iteration)

    prefill.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    GenerationMixin._prefill = prefill


def _chunk_of(model: Any) -> int | None:
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    chunk = config.prefill_chunk if isinstance(config, CiuicConfig) else None
    return chunk if isinstance(chunk, int) else None


def _is_static(cache: Any) -> bool:
    """Whether it is a CiuicCache of fixed length."""
    from ciuic_hf.hf.static_cache import CiuicStaticLayer

    return any(isinstance(layer, CiuicStaticLayer) for layer in getattr(cache, "layers", ()))


def _is_short(input_ids: Any, chunk: int, cache: Any, model_kwargs: dict[str, Any]) -> bool:
    """Whether what is new is one piece."""
    new, mask = input_ids.shape[1], model_kwargs.get("attention_mask")
    if mask is not None and mask.shape[1] == new:
        new -= cache.get_seq_length()
    return bool(new <= chunk)


def _feed(model: Any, embeds: Any, chunk: int, model_kwargs: dict[str, Any]) -> None:
    """Put all pieces of embeddings ``[B, length, hidden]`` but the last into the cache."""
    cache, length = model_kwargs[cache_name()], embeds.shape[1]
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    logits = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    for start in range(cache.get_seq_length(), length - chunk, chunk):
        stop = start + chunk
        model(
            inputs_embeds=embeds[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            position_ids=None if positions is None else positions[..., start:stop],
            use_cache=True,
            **{cache_name(): cache},
            **logits,
        )
