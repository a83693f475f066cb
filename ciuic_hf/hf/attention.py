"""The attention implementation ``"ciuic"``: transformers' own sdpa, and tile by tile where a CiuicCache is read.

Registered under that name, for attention and for masks, when the first CiuicCache is made. A causal mask over many
tokens is made for one tile at a time; any other mask is what sdpa gets.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.cache import CachedStates
from ciuic_hf.hf.latent import KvUpProjection, has_latents, latent_shape
from ciuic_hf.hf.static_cache import attend_static_cache, expand_static
from ciuic_hf.runtime.cache.attention import Mask, attend
from ciuic_hf.runtime.cache.deferred import Deferred
from ciuic_hf.runtime.cache.latent import attend_latent
from ciuic_hf.runtime.cache.static_attention import StaticHistory
from ciuic_hf.runtime.cache.store import History

NAME = "ciuic"


class CausalMask(Deferred):
    """A bool mask ``[B, 1, Q, length]`` that hides the future and padding.

    Attributes:
        padding: bool ``[B, length]`` or None.
    """

    padding: Tensor | None


class ExpandedStates(Deferred):
    """Keys or values ``[B, heads, length, D]`` that ``expand_kv`` would make of the latents in a history."""

    history: History


def ciuic_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of ``ciuic`` attention, by the signature of transformers' mask functions."""
    arguments = {
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "device": device,
    }
    arguments |= {"attention_mask": attention_mask, "allow_is_causal_skip": allow_is_causal_skip, **kwargs}

    def dense(**changed: Any) -> Any:
        return sdpa_mask(batch_size, q_length, kv_length, **(arguments | changed))

    plain = mask_function is causal_mask_function and allow_is_causal_skip and kv_offset == 0
    if not plain or q_length == 1 or not isinstance(q_offset, int) or q_offset + q_length != kv_length:
        return dense()
    padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
    if padding is None and q_offset == 0:
        return None
    mask = CausalMask(
        (batch_size, 1, q_length, kv_length),
        torch.bool,
        torch.device(device),
        lambda: dense(allow_is_causal_skip=False),
    )
    mask.padding = padding
    return mask


def ciuic_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by the signature of transformers' attention functions.

    Raises:
        CiuicError: for attention with a soft cap or sinks.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise CiuicError(
                f'{type(module).__name__} uses {name}, which "ciuic" attention does not have; load the model with '
                'attn_implementation="eager", which reads a CiuicCache decompressed.'
            )
    if (indices := kwargs.pop("indices", None)) is not None:
        attention_mask = _only(indices, attention_mask, key.shape[2])
    history = getattr(key, "history", None)
    if isinstance(history, StaticHistory):
        return attend_static_cache(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    alone = (
        history is not None and history.past == 0 and isinstance(key, CachedStates) and attention_mask is None
    )
    if history is None or alone or dropout or kwargs.get("position_bias") is not None:
        states = [x.compute() if isinstance(x, Deferred) else x for x in (key, value, attention_mask)]
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, *states, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return out
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _mask(attention_mask, causal and query.shape[2] > 1)
    with torch.no_grad():
        if isinstance(key, ExpandedStates):
            out_states = attend_latent(
                query, history, KvUpProjection(module), latent_shape(module), scaling, mask
            )
        else:
            out_states = attend(query, history, scaling, mask)
    if torch.is_grad_enabled() and query.requires_grad:
        out_states = NoGradient.apply(query, out_states)
    return out_states.transpose(1, 2).contiguous(), None


def _only(indices: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """A mask that also hides what sparse attention (DeepSeek-V3.2) did not choose.

    Args:
        indices: ``[B, Q, n]``, the tokens that were chosen.
    """
    chosen = torch.zeros(*indices.shape[:2], length, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter_(-1, indices.long(), True)[:, None]
    if mask is None:
        return chosen
    return (
        mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)
    )


def _mask(mask: Tensor | None, causal: bool) -> Mask:
    if isinstance(mask, CausalMask):
        return Mask(causal=True, padding=mask.padding)
    return Mask(causal=causal and mask is None, dense=mask)


class NoGradient(torch.autograd.Function):
    """The result of attention to a compressed cache, which cannot be differentiated."""

    @staticmethod
    def forward(_ctx: Any, _query: Tensor, out: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(_ctx: Any, *_grad: Tensor) -> Any:
        raise CiuicError("A CiuicCache carries no gradients; train without a cache (use_cache=False).")


def _expand_kv(self: Any, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a module's ``expand_kv``: leaves latents in a CiuicCache as they are for ``ciuic`` attention."""
    original = type(self).expand_kv
    if (
        isinstance(getattr(kv_nope, "history", None), StaticHistory)
        and self.config._attn_implementation == NAME
    ):
        return expand_static(self, kv_nope, k_rot, original)
    if not isinstance(kv_nope, CachedStates) or self.config._attn_implementation != NAME:
        expanded: tuple[Tensor, Tensor] = original(self, kv_nope, k_rot)
        return expanded
    states = []
    for which, width in enumerate((self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)):
        heads = self.kv_b_proj.out_features // (self.qk_nope_head_dim + self.v_head_dim)
        shape = (kv_nope.shape[0], heads, kv_nope.shape[2], width)

        def expand(which: int = which) -> Tensor:
            return original(self, kv_nope.compute(), k_rot.compute())[which]  # type: ignore[attr-defined]

        one = ExpandedStates(shape, kv_nope.dtype, kv_nope.device, expand)
        one.history = kv_nope.history
        states.append(one)
    return states[0], states[1]


def switch(model: Any) -> None:
    """See ``ciuic_hf.use_ciuic_attention``."""
    model.set_attn_implementation(NAME)
    if model.config.get_text_config(decoder=True)._attn_implementation != NAME:
        raise CiuicError(
            f"The attention of {type(model).__name__} cannot be exchanged; it reads a CiuicCache decompressed."
        )
    for module in model.modules():
        if has_latents(module) and "expand_kv" not in module.__dict__:
            module.expand_kv = MethodType(_expand_kv, module)


def install() -> None:
    """Register the implementation."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, ciuic_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ciuic_mask)
