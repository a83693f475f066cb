"""What of a model is compressed: routers that are plain Linears are found by what stands beside them."""

from __future__ import annotations

import pytest
from torch import nn

from ciuic_hf.config import CompressionIntent
from ciuic_hf.modules.targets import find_targets


class FusedExperts(nn.Module):
    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            nn.Linear(hidden, 2 * inner * experts).weight.view(experts, -1, hidden)
        )
        self.down_proj = nn.Parameter(nn.Linear(inner, hidden * experts).weight.view(experts, hidden, inner))
        self.is_transposed = self.has_bias = self.has_post_expert_norm = False
        self.has_gate = self.is_concatenated = True

    def _apply_gate(self, x: object) -> object:
        return x


class Moe(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 8)
        self.shared_expert_gate = nn.Linear(64, 1)
        self.shared_expert = nn.Linear(64, 64)
        self.experts = experts


@pytest.mark.parametrize("kind", ["fused", "list"])
def test_linear_routers_are_kept(kind: str) -> None:
    experts = (
        FusedExperts(8, 64, 32) if kind == "fused" else nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
    )
    model = nn.ModuleDict({"mlp": Moe(experts)})
    targets, kept = find_targets(model, CompressionIntent(4.25))
    assert {k.name: k.reason for k in kept} == {
        "mlp.gate.weight": "a router",
        "mlp.shared_expert_gate.weight": "a router",
    }
    assert {t.name: t.role for t in targets if "experts." not in t.name} == {
        "mlp.shared_expert.weight": "shared_experts"
    }
    assert {t.role for t in targets if "experts." in t.name} == {"experts"}


def test_a_narrow_linear_elsewhere_is_compressed() -> None:
    targets, kept = find_targets(nn.ModuleDict({"head": nn.Linear(256, 2)}), CompressionIntent(8))
    assert [t.name for t in targets] == ["head.weight"] and not kept
