"""``kv_b_proj`` of an attention with latents, from either side: on expanded latents, or absorbed into queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ciuic_hf.modules.linear import WEIGHT, CiuicLinear
from ciuic_hf.modules.packed import TAGS
from ciuic_hf.planning.tiles import BAND_WEIGHTS, LatentShape
from ciuic_kernels import ops
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.ops._products import Matrix

_ATTRIBUTES = ("expand_kv", "kv_b_proj", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def has_latents(module: nn.Module) -> bool:
    """Whether it is an attention of transformers that caches latents and expands them by ``expand_kv``."""
    return all(hasattr(module, name) for name in _ATTRIBUTES)


def latent_shape(module: Any) -> LatentShape:
    return LatentShape(
        module.kv_lora_rank, module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
    )


class KvUpProjection:
    """The heads' ``Wk`` and ``Wv``, rows ``[nope, value]`` of each head in ``kv_b_proj``.

    They are absorbed where the weight can be read: a plain Linear or a compressed one, without bias. With an adapter on
    it, or weights that come and go with a hook, latents are expanded by the module itself.
    """

    def __init__(self, module: Any) -> None:
        self.linear, self.shape = module.kv_b_proj, latent_shape(module)
        self.can_absorb = (
            type(self.linear) in (nn.Linear, CiuicLinear)
            and self.linear.bias is None
            and not hasattr(self.linear, "_hf_hook")
            and not self.linear._forward_hooks
            and not self.linear._forward_pre_hooks
        )

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        heads = (
            self.linear(latent)[:, 0].unflatten(-1, (-1, self.shape.nope + self.shape.value)).transpose(1, 2)
        )
        nope, value = heads.split([self.shape.nope, self.shape.value], dim=-1)
        return nope, value

    def absorb(self, query: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], self.shape.rank)
        for heads, weight in self._bands(query.dtype):
            out[:, heads] = query[:, heads] @ weight[:, : self.shape.nope]
        return out

    def project(self, latent: Tensor) -> Tensor:
        out = latent.new_empty(*latent.shape[:-1], self.shape.value)
        for heads, weight in self._bands(latent.dtype):
            out[:, heads] = latent[:, heads] @ weight[:, self.shape.nope :].mT
        return out

    def _bands(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Dense weights ``[heads, nope + value, rank]`` of some heads at a time."""
        rows = self.shape.nope + self.shape.value
        count = self.linear.out_features // rows
        step = max(1, BAND_WEIGHTS // (rows * self.shape.rank))
        if not isinstance(self.linear, CiuicLinear) or not self.linear.is_compressed:
            weight = self.linear.weight.view(count, rows, self.shape.rank)
            for first in range(0, count, step):
                yield slice(first, first + step), weight[first : first + step].to(dtype)
            return
        packed = (self.linear.weight, self.linear.get_parameter(WEIGHT + TAGS), *self.linear.derived(WEIGHT))
        if torch.compiler.is_compiling():  # which takes one operator, not the steps of one
            weight = ops.dequantize(*packed, count * rows, self.shape.rank, dtype)
            yield slice(0, count), weight.view(count, rows, self.shape.rank)
            return
        matrix = Matrix(*packed, count * rows, self.shape.rank)
        for first in range(0, count, step):
            last = min(first + step, count)
            strips = range(first * rows // BLOCK_ROWS, -(-last * rows // BLOCK_ROWS))
            band = matrix.decode(strips, dtype)
            skip = first * rows - strips.start * BLOCK_ROWS
            yield (
                slice(first, last),
                band[skip : skip + (last - first) * rows].view(-1, rows, self.shape.rank),
            )
