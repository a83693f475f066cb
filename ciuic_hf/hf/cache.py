"""``CiuicCache``: a transformers ``Cache`` that keeps its tokens compressed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    get_layer_types_and_kwargs,
)
from transformers.utils import logging

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.cache_formats import CACHE_BITS, cache_formats, check_cache_bits
from ciuic_hf.runtime.cache.deferred import Deferred
from ciuic_hf.runtime.cache.store import History, LayerStore

logger = logging.get_logger(__name__)


class CachedStates(Deferred):
    """All keys or all values of a layer ``[B, H, length, D]``, which ``ciuic`` attention reads compressed.

    Attributes:
        history: what it stands for.
    """

    history: History

    @staticmethod
    def of(history: History, which: int, notice: Any) -> CachedStates:
        """Keys (0) or values (1) of a history; ``notice`` is called when they are decompressed after all."""
        fresh = history.fresh[which]

        def compute() -> Tensor:
            if history.past:
                notice()
            return history.dense(which)

        shape = (*fresh.shape[:2], history.length, fresh.shape[-1])
        out = CachedStates(shape, fresh.dtype, fresh.device, compute)
        out.history = history
        return out


class CiuicLayer(DynamicLayer):
    """One layer of full attention.

    Args:
        bits: 8, 4, 3 or 2.
        latent: widths of latent and rotary part where the model caches those (multi-head latent attention).
    """

    is_croppable = True

    def __init__(self, bits: int = 4, latent: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.bits, self._latent = bits, latent
        self.store: LayerStore | None = None

    @property
    def nbytes(self) -> int:
        """Everything that is allocated."""
        return 0 if self.store is None else self.store.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        widths = key_states.shape[-1], value_states.shape[-1]
        self.store = LayerStore(cache_formats(self.bits, key_states.shape[1] == 1 and widths == self._latent))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add ``[B, H, t, D]`` and ``[B, H, t, E]``; what is returned has all tokens, see ``CachedStates``.

        Raises:
            CiuicError: for states of another shape or dtype than those that are cached.
        """
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        self._check(key_states, value_states)
        self.prefetch()
        keys, values = key_states.detach(), value_states.detach()
        history = History(self.store, keys, values)
        self.store.append(keys, values)
        return CachedStates.of(history, 0, say_decompressed), CachedStates.of(history, 1, say_decompressed)

    def _check(self, *states: Tensor) -> None:
        assert self.store is not None
        if self.store.tail is None:
            return
        for new, cached in zip(states, self.store.tail, strict=True):
            if new.shape[:2] != cached.shape[:2] or new.shape[3] != cached.shape[3]:
                shown = [f"{x.shape[0]} sequences, {x.shape[1]} heads of {x.shape[3]}" for x in (cached, new)]
                raise CiuicError(
                    f"This cache holds {shown[0]}, the model gives {shown[1]}; use one CiuicCache for each model and "
                    "batch, or reset() it first."
                )
            if new.dtype != cached.dtype:
                raise CiuicError(
                    f"This cache was filled in {cached.dtype}, the model now computes in {new.dtype}; reset() it first."
                )

    def get_seq_length(self) -> int:
        return 0 if self.store is None else len(self.store)

    def reset(self) -> None:
        self.store, self.is_initialized = None, False
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is a length to crop to."""
        if self.store is None or tokens_to_remove == 0:
            return
        length = len(self.store)
        kept = min(tokens_to_remove, length) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        self.store.truncate(kept)

    def _map(self, fn: Any) -> None:
        if self.store is not None:
            self.store.map(fn)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))


class CiuicIndexedLayer(DynamicIndexedLayer, CiuicLayer):
    """One layer of sparse attention (DeepSeek-V3.2): the keys of its indexer stay as they are."""

    def __init__(self, bits: int = 4, latent: tuple[int, int] | None = None) -> None:
        super().__init__()  # transformers' class passes nothing on
        self.bits, self._latent = bits, latent


def say_decompressed() -> None:
    """Once."""
    logger.warning_once(
        "This model reads a CiuicCache through an attention that needs all of it decompressed, layer by layer: "
        "results are the same, memory is not saved while it runs. Use ciuic_hf.use_ciuic_attention(model)."
    )


class CiuicCache(Cache):
    """Keys and values of the past in 8, 4, 3 or 2 bits.

    A token is packed once, when it leaves the last 32 to 95 (at 2 bits 159), which stay in full precision, and is
    never packed again. Keys are stored by channel, values by token (docs/cache.md); of DeepSeek's multi-head latent
    attention the latent is stored, and its rotary part at 8 bits. Layers with a sliding window or a recurrent state
    keep transformers' own storage, which does not grow.

    ``generate`` switches the model to the attention that reads the packed bytes; elsewhere call
    ``ciuic_hf.use_ciuic_attention(model)`` once.

    Args:
        config: of the model.
        bits: 8, 4, 3 or 2; what that takes in all is ``ciuic_hf.planning.cache_formats.cache_nbytes_per_token``.
        offloading: keep layers on the CPU while others run, as transformers does.
        max_cache_len: tokens of prompt and answer together. Given, all memory is allocated with the first token and
            never moves, and ``torch.compile`` and CUDA graphs take the model with its cache, as they do with a
            StaticCache; None grows with the tokens.

    Raises:
        CiuicError: for what is no config, other bits, a length below 1, and a model that has nothing to cache.

    Example:
        ``model.generate(**inputs, past_key_values=CiuicCache(model.config, bits=4))``
    """

    def __init__(
        self,
        config: Any,
        bits: int = 4,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        max_cache_len: int | None = None,
    ) -> None:
        self.bits = check_cache_bits(bits)
        if not hasattr(config, "get_text_config"):
            raise CiuicError(
                f"CiuicCache takes the config of a model, got {type(config).__name__}; write CiuicCache(model.config)."
            )
        if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
            raise CiuicError(
                f"max_cache_len is a number of tokens or None, got {max_cache_len!r}; count prompt and new tokens."
            )
        _install()
        super().__init__(
            layers=_layers(config, bits, max_cache_len),
            offloading=offloading,
            offload_only_non_sliding=offload_only_non_sliding,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the layers that are compressed."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if layer_idx >= len(self.layers):
            raise CiuicError(
                f"This cache was made for a model of {len(self.layers)} layers and is given layer {layer_idx}; make a "
                "CiuicCache(model.config) for each model."
            )
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated


def use_ciuic_attention(model: Any) -> Any:
    """Have a transformers model read a CiuicCache tile by tile; with any other cache it computes as with sdpa.

    Attention with latents (DeepSeek V2, V3) attends to the latents themselves.

    Returns:
        The model.

    Raises:
        CiuicError: for a model whose attention cannot be exchanged.
    """
    _install()
    from ciuic_hf.hf.attention import switch

    switch(model)
    return model


def can_compress_cache(config: Any) -> bool:
    """Whether a CiuicCache serves a model of this config."""
    try:
        _layers(config, CACHE_BITS[0])
    except CiuicError:
        return False
    return True


def _install() -> None:
    """Let transformers know the cache. At the first use: what this imports makes ``import ciuic_hf`` slow."""
    from ciuic_hf.hf import generating

    generating.install()


def _layers(config: Any, bits: int, max_cache_len: int | None = None) -> list[Any]:
    """A layer for each of the model's, static ones where a length is given. Raises CiuicError."""
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise CiuicError(
            f"{kind} is an encoder-decoder, which a CiuicCache does not serve; use its own cache."
        )
    decoder = config.get_text_config(decoder=True)
    latent = None
    if getattr(decoder, "kv_lora_rank", None):
        latent = (decoder.kv_lora_rank, decoder.qk_rope_head_dim)
    try:
        names, arguments = get_layer_types_and_kwargs(decoder)
        classes = [DYNAMIC_LAYER_TYPE_MAPPING[name] for name in names]
    except (AttributeError, KeyError) as error:
        raise CiuicError(f"{kind} has layers that no cache of transformers describes ({error}).") from None
    if isinstance(arguments, dict):  # transformers 5.17 has one for all layers
        arguments = [arguments] * len(names)
    layers: list[Any] = []
    compressed: Any = (CiuicLayer, CiuicIndexedLayer)
    static = {"max_cache_len": max_cache_len} if max_cache_len is not None else {}
    if static:
        from ciuic_hf.hf.static_cache import CiuicStaticLayer

        compressed = (CiuicStaticLayer,)
        if DynamicIndexedLayer in classes:
            raise CiuicError(
                f"{kind} has sparse attention with an indexer, for which there is no compressed cache of fixed length; "
                "use a CiuicCache without max_cache_len."
            )
    for name, cls, options in zip(names, classes, arguments, strict=True):
        if cls in (DynamicLayer, DynamicIndexedLayer):
            layers.append(compressed[cls is DynamicIndexedLayer](bits=bits, latent=latent, **static))
        elif issubclass(cls, DynamicLayer) and not getattr(cls, "is_sliding", False):
            raise CiuicError(
                f"{kind} has layers of type {name}, whose cache a CiuicCache cannot stand for; use its own cache."
            )
        else:
            layers.append((STATIC_LAYER_TYPE_MAPPING[name] if static else cls)(**static, **options))
    if not any(isinstance(layer, compressed) for layer in layers):
        raise CiuicError(
            f"{kind} has no layer with full attention, so there is no growing cache to compress; use its own cache."
        )
    return layers
