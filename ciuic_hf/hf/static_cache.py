"""Layers of a ``CiuicCache(max_cache_len=...)``, and how ``"ciuic"`` attention reads them.

While a compiler traces, ``update`` returns the result of an operator that decompresses, with the history as an
attribute: attention that knows it takes the history and leaves the result unused, so that the compiler removes the
operator; any other attention uses it. In eager mode the same is a tensor without data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.latent import KvUpProjection, has_latents, latent_shape
from ciuic_hf.runtime.cache.deferred import Deferred
from ciuic_hf.runtime.cache.static_attention import (
    StaticHistory,
    attend_expanded,
    attend_heads,
    attend_latents,
)
from ciuic_hf.runtime.cache.static_store import StaticStore


class StaticStates(Deferred):
    """Keys or values ``[B, H, max_cache_len, D]`` that a history stands for."""

    history: StaticHistory


def _states(
    history: StaticHistory, shape: tuple[int, ...], compute: Callable[[], Tensor], notice: bool = True
) -> Tensor:
    """What ``compute`` returns, when it is needed."""
    if torch.compiler.is_compiling():
        out = compute()
        out.history = history  # type: ignore[attr-defined]
        return out

    def said() -> Tensor:
        if notice:
            from ciuic_hf.hf.cache import say_decompressed

            say_decompressed()
        return compute()

    states = StaticStates(shape, history.recent[0].dtype, history.recent[0].device, said)
    states.history = history
    return states


class CiuicStaticLayer(StaticLayer):
    """One layer of full attention with room for ``max_cache_len`` tokens.

    A step into an empty layer gets its own states back, so that a prompt is computed as without a cache.

    Args:
        bits: 8, 4, 3 or 2.
        latent: widths of latent and rotary part where the model caches those.
    """

    store: StaticStore | None = None
    is_empty = True  # known without asking the device

    def __init__(self, max_cache_len: int, bits: int = 4, latent: tuple[int, int] | None = None) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.bits, self._latent = bits, latent

    @property
    def nbytes(self) -> int:
        """Everything that is allocated."""
        return 0 if self.store is None else self.store.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        latent = self.num_heads == 1 and (self.k_head_dim, self.v_head_dim) == self._latent
        self.store = StaticStore(self.bits, latent, self.max_cache_len, key_states, value_states)
        self._fix_addresses()
        self.is_initialized = True

    def _fix_addresses(self) -> None:
        assert self.store is not None
        self.cumulative_length = self.store.length
        if not torch.compiler.is_compiling():
            for tensor in (*self.store.tensors(), self.store.addresses):
                torch._dynamo.mark_static_address(tensor)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add ``[B, H, t, D]`` and ``[B, H, t, E]``; what is returned stands for all tokens, see the module.

        Raises:
            CiuicError: for states of another shape or dtype than those that are cached, and, where it can be known
                without waiting for a GPU, for more tokens than fit.
        """
        if self.store is None:
            self.lazy_initialization(key_states, value_states)
        store = self.store
        assert store is not None
        self._check(key_states, value_states)
        keys, values = key_states.detach(), value_states.detach()
        if self.is_empty:
            self.is_empty = False
            store.append(store.recent(keys, values))
            return key_states, value_states
        history = StaticHistory.of(store, keys, values)
        store.append(history.recent)
        shapes = [(*x.shape[:2], self.max_cache_len, x.shape[3]) for x in (keys, values)]
        return (
            _states(history, shapes[0], lambda: history.dense(0)),
            _states(history, shapes[1], lambda: history.dense(1)),
        )

    def _check(self, keys: Tensor, values: Tensor) -> None:
        assert self.store is not None
        if keys.shape[2] > self.max_cache_len:
            raise CiuicError(
                f"{keys.shape[2]} tokens do not fit this static CiuicCache; give max_cache_len (now "
                f"{self.max_cache_len}) room for prompt and new tokens."
            )
        for new, cached in zip((keys, values), self.store.tails, strict=True):
            if new.shape[:2] != cached.shape[:2] or new.shape[3] != cached.shape[3]:
                shown = [f"{x.shape[0]} sequences, {x.shape[1]} heads of {x.shape[3]}" for x in (cached, new)]
                raise CiuicError(
                    f"This static cache was made for {shown[0]}, the model gives {shown[1]}; make a CiuicCache for "
                    "each model and batch size."
                )
            if new.dtype != cached.dtype:
                raise CiuicError(
                    f"This static cache was made for {cached.dtype}, the model now computes in {new.dtype}; make "
                    "another CiuicCache."
                )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.is_empty else self.max_cache_len), 0

    def get_seq_length(self) -> int | Tensor:
        return 0 if self.store is None or self.is_empty else self.store.length

    def reset(self) -> None:
        """Forget all tokens, in place."""
        self.is_empty = True
        if self.store is not None:
            self.store.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is a length to crop to.

        Raises:
            CiuicError: where a part of a packed group would have to stay; the last 32 of a step can go.
        """
        if self.store is None or self.is_empty or tokens_to_remove == 0:
            return
        length = int(self.store.length)
        kept = tokens_to_remove if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        self.store.truncate(kept)
        self.is_empty = kept == 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place."""
        if self.store is not None:
            self.store.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """A cache of another batch: what was compiled for it is compiled anew."""
        self._map_batch(lambda x, axis: x.repeat_interleave(repeats, dim=axis))

    def batch_select_indices(self, indices: Tensor) -> None:
        """A cache of another batch: what was compiled for it is compiled anew."""
        self._map_batch(lambda x, axis: x.index_select(axis, _numbers(indices).to(x.device)))

    def _map_batch(self, fn: Callable[[Tensor, int], Tensor]) -> None:
        if self.store is not None:
            self.store.map_batch(fn)
            self.batch_size = self.store.tails[0].shape[0]
            self._fix_addresses()

    def offload(self) -> None:
        if self.store is not None:
            self.store.move("cpu")

    def prefetch(self) -> None:
        if self.store is not None:
            self.store.move(self.device)


def _numbers(indices: Tensor) -> Tensor:
    """Of the sequences that a bool mask or numbers choose."""
    return indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices


def attend_static_cache(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention to what ``CiuicStaticLayer.update`` returned, or ``expand_static`` made of it.

    Args:
        mask: ``[B or 1, heads or 1, Q, max_cache_len]``; None for a causal one.
    """
    history: StaticHistory = key.history  # type: ignore[attr-defined]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    compiling, latents = torch.compiler.is_compiling(), history.latent and has_latents(module)
    up = KvUpProjection(module) if latents else None
    if dropout or kwargs.get("position_bias") is not None:
        states = [x.compute() if isinstance(x, Deferred) else x for x in (key, value)]
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, *states, mask, dropout=dropout, scaling=scale, **kwargs
        )
        return out
    with torch.no_grad():
        if up is None:
            sums = attend_heads(query, history, scale, mask)
        else:
            shape = latent_shape(module)
            absorbs = compiling or (up.can_absorb and shape.absorbs(query.shape[2]))
            attend = attend_latents if absorbs else attend_expanded
            sums = attend(query, history, up, shape, scale, mask)
    if torch.is_grad_enabled() and query.requires_grad:
        from ciuic_hf.hf.attention import NoGradient

        sums = NoGradient.apply(query, sums)
    return sums.transpose(1, 2).contiguous(), None


def expand_static(
    module: Any, kv_nope: Tensor, k_rot: Tensor, original: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """``expand_kv`` for latents in a static cache: what the original makes of them, when it is needed.

    A compiler gets the latents themselves where attention can absorb the projection, and all of it expanded elsewhere.
    """
    history: StaticHistory = kv_nope.history  # type: ignore[attr-defined]
    if torch.compiler.is_compiling():
        absorbs = KvUpProjection(module).can_absorb and not module.training
        return (kv_nope, k_rot) if absorbs else original(module, kv_nope.clone(), k_rot)
    length, rows = kv_nope.shape[2], module.qk_nope_head_dim + module.v_head_dim
    heads = module.kv_b_proj.out_features // rows
    states = []
    for which, width in enumerate((module.qk_nope_head_dim + module.qk_rope_head_dim, module.v_head_dim)):

        def expand(which: int = which) -> Tensor:
            return original(module, kv_nope.compute(), k_rot.compute())[which]  # type: ignore[attr-defined]

        states.append(_states(history, (kv_nope.shape[0], heads, length, width), expand, notice=False))
    return states[0], states[1]
