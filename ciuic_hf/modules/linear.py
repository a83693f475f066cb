"""``CiuicLinear``: ``nn.Linear`` with a compressed weight."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ciuic_hf.modules.packed import PackedModule, adopt
from ciuic_kernels import PackedTensor, ops


class CiuicLinear(PackedModule, nn.Linear):
    """``y = x @ W.T + b`` with W ``[N, K]`` decoded on the fly.

    A subclass of ``nn.Linear``, so PEFT and everything else that looks for one finds it. Gradients flow to the
    input (and a bias), never to the weight.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear, dtype: torch.dtype | None = None) -> Self:
        """Turn a Linear into a CiuicLinear in place, without a weight; ``set_packed`` installs one."""
        adopt(linear, cls, ["weight"], dtype)
        assert isinstance(linear, cls)
        return linear

    @classmethod
    def from_packed(
        cls, packed: PackedTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Self:
        """A new module from a compressed ``[N, K]`` weight."""
        rows, cols = packed.shape
        linear = nn.Linear(cols, rows, bias=bias is not None, device="meta", dtype=dtype)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        module = cls.adopt(linear, dtype)
        module.set_packed("weight", packed)
        return module

    def dense_class(self) -> type[nn.Module]:
        return nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K] -> [..., N]`` in the input's dtype."""
        rows, cols = self.out_features, self.in_features
        return ops.linear(
            input, self.weight, self.weight_tags, *self.derived("weight"), self.bias, rows, cols
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.packed_repr()}"
