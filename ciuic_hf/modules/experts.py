"""Compressed fused experts: the ``[E, N, K]`` parameters of a mixture-of-experts layer.

transformers keeps all experts of a layer in two parameters, ``gate_up_proj [E, 2 I, H]`` and ``down_proj
[E, H, I]``. The module keeps its class's activation and gating; only the products change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ciuic_hf.modules.packed import PackedModule, adopt
from ciuic_hf.planning.memory import SUMMED
from ciuic_kernels import ops

EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")

_UNSUPPORTED = {
    "is_transposed": (True, "its weights are transposed ([E, K, N])"),
    "has_bias": (True, "its experts have biases"),
    "has_gate": (False, "its experts have no gate"),
    "is_concatenated": (False, "gate and up are interleaved"),
    "has_post_expert_norm": (True, "it normalises after each expert"),
}


class LowRank(NamedTuple):
    """What an adapter adds to the experts of a parameter ``[E, N, K]``: ``scale * b[e] @ a[e]``.

    Attributes:
        a, b: ``[E, R, K]`` and ``[E, N, R]``, floating point.
    """

    a: Tensor
    b: Tensor
    scale: float


class CiuicExperts(PackedModule):
    """Mixin that computes fused experts from compressed parameters; see :func:`adopt_experts`."""

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        low_rank: Mapping[str, Sequence[LowRank]] | None = None,
    ) -> Tensor:
        """Sum of the routed experts' outputs.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: int64 ``[T, k]``; an id of E means no expert.
            top_k_weights: ``[T, k]``.
            low_rank: adapters, by the parameter that they add to.

        Returns:
            ``[T, H]`` in the dtype of ``hidden_states``.
        """
        adapters = low_rank or {}
        gated = self.gate(self._products(hidden_states, top_k_index, "gate_up_proj", adapters))
        down = self._products(gated, top_k_index, "down_proj", adapters)
        del gated
        return weighted_sum(down.unflatten(0, top_k_index.shape), top_k_weights, hidden_states.dtype)

    def gate(self, gate_up: Tensor) -> Tensor:
        """``[S, 2 I] -> [S, I]``: the activation and gating of the class this was made from."""
        base: Any = super()
        return base._apply_gate(gate_up)

    def _products(
        self, x: Tensor, expert_ids: Tensor, name: str, adapters: Mapping[str, Sequence[LowRank]]
    ) -> Tensor:
        arena, tags = getattr(self, name), getattr(self, f"{name}_tags")
        _, rows, cols = self.packed_shapes[name]
        y = ops.expert_linear(x, expert_ids, arena, tags, *self.derived(name), rows, cols)
        for a, b, scale in adapters.get(name, ()):
            y = y + ops.expert_low_rank(x, expert_ids, a, b, scale)
        return y

    def dense_class(self) -> type[nn.Module]:
        return type(self).__bases__[1]

    def extra_repr(self) -> str:
        return self.packed_repr()


@cache
def _compressed_class(base: type[nn.Module]) -> type[nn.Module]:
    """``Ciuic<Base>``: the base class with the products of CiuicExperts."""
    return type(f"Ciuic{base.__name__}", (CiuicExperts, base), {"__module__": __name__})


def weighted_sum(outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the experts of each token: outputs ``[T, k, H]`` times weights ``[T, k]``, as ``[T, H]`` of ``dtype``.

    Many tokens are summed some at a time, with the same result bit for bit.
    """
    tokens = max(1, SUMMED // max(1, outputs[0].numel())) if len(outputs) else 1
    if len(outputs) <= tokens or (
        torch.is_grad_enabled() and (outputs.requires_grad or weights.requires_grad)
    ):
        return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(dtype)
    out = outputs.new_empty(len(outputs), outputs.shape[-1], dtype=dtype)
    for first in range(0, len(outputs), tokens):
        some = slice(first, first + tokens)
        out[some] = (outputs[some] * weights[some].unsqueeze(-1)).sum(dim=1)
    return out


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds 3-D expert parameters."""
    return any(isinstance(p, nn.Parameter) and p.dim() == 3 for p in module._parameters.values())


def unsupported_reason(module: nn.Module) -> str:
    """Why fused experts cannot be compressed, or an empty string."""
    three_d = {name: p for name, p in module._parameters.items() if p is not None and p.dim() == 3}
    if set(three_d) != set(EXPERT_PARAMETERS) or set(module._parameters) != set(EXPERT_PARAMETERS):
        return f"its parameters are {', '.join(module._parameters)} instead of {', '.join(EXPERT_PARAMETERS)}"
    for flag, (bad, reason) in _UNSUPPORTED.items():
        if getattr(module, flag, not bad) == bad:
            return reason
    experts, double, hidden = three_d["gate_up_proj"].shape
    if tuple(three_d["down_proj"].shape) != (experts, hidden, double // 2) or not hasattr(
        module, "_apply_gate"
    ):
        return (
            f"gate_up_proj {list(three_d['gate_up_proj'].shape)} and down_proj {list(three_d['down_proj'].shape)} "
            "are not [E, 2 I, H] and [E, H, I] with a gate"
        )
    return ""


def adopt_experts(module: nn.Module, dtype: torch.dtype | None = None) -> CiuicExperts:
    """Turn fused experts into compressed ones in place, without weights; ``set_packed`` installs them."""
    compressed = _compressed_class(type(module))  # type: ignore[arg-type]
    adopt(module, compressed, EXPERT_PARAMETERS, dtype)
    assert isinstance(module, CiuicExperts)
    return module
