"""Compressed modules by themselves: adopted from dense ones, computing like them, and turned back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ciuic_hf import CiuicEmbedding, CiuicError, CiuicExperts, CiuicLinear
from ciuic_hf.modules.experts import adopt_experts, unsupported_reason
from ciuic_kernels import PackedTensor
from ciuic_kernels.codec import codec_by_name
from ciuic_kernels.format import BlockGrid
from ciuic_kernels.packing import decode_tensor, encode_tensor


class Experts(nn.Module):
    """Fused experts as transformers lays them out."""

    is_transposed, has_bias, has_gate, is_concatenated = False, False, True, True

    def __init__(self, experts: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner) * 0.1)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def pack(weight: torch.Tensor, codec: str = "grid8_g32") -> PackedTensor:
    """Encode with one codec."""
    tags = torch.full(
        BlockGrid(tuple(weight.shape)).tags_shape[:-1], codec_by_name(codec).id, dtype=torch.uint8
    )
    return encode_tensor(weight.detach(), tags)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (72, 200), (1, 16), (130, 129)])
def test_linear(shape: tuple[int, int], bias: bool) -> None:
    dense = nn.Linear(shape[1], shape[0], bias=bias)
    packed = pack(dense.weight)
    decoded = decode_tensor(packed)
    x = torch.randn(3, 5, shape[1])
    expected = nn.functional.linear(x, decoded, dense.bias)
    module = CiuicLinear.adopt(dense)
    module.set_packed("weight", packed)
    assert isinstance(module, nn.Linear) and module is dense
    torch.testing.assert_close(module(x), expected, atol=1e-4, rtol=1e-4)
    other = CiuicLinear.from_packed(packed, dense.bias, torch.float32)
    assert torch.equal(other(x), module(x))
    restored = module.restore(torch.float32)
    assert type(restored) is nn.Linear and torch.equal(restored.weight, decoded)
    assert not hasattr(restored, "weight_tags") and not hasattr(restored, "packed_shapes")


def test_embedding() -> None:
    dense = nn.Embedding(70, 130, dtype=torch.bfloat16)
    packed = pack(dense.weight)
    module = CiuicEmbedding.adopt(dense)
    module.set_packed("weight", packed)
    ids = torch.tensor([[0, 69], [5, 5]])
    assert torch.equal(module(ids), decode_tensor(packed, torch.bfloat16)[ids])
    assert type(module.restore(torch.bfloat16)) is nn.Embedding


def test_experts() -> None:
    dense = Experts(4, 40, 144)
    packed = {name: pack(p) for name, p in dense.named_parameters()}
    gate_up, down = (decode_tensor(packed[name]) for name in ("gate_up_proj", "down_proj"))
    module = adopt_experts(dense)
    for name, tensor in packed.items():
        module.set_packed(name, tensor)
    x, weights = torch.randn(6, 144), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [2, 3], [0, 0], [3, 1], [4, 2], [4, 4]])  # 4: no expert
    expected = torch.zeros(6, 144)
    for token in range(6):
        for slot in range(2):
            expert = int(chosen[token, slot])
            if expert < 4:
                inner = dense._apply_gate(x[token] @ gate_up[expert].T)
                expected[token] += weights[token, slot] * (inner @ down[expert].T)
    torch.testing.assert_close(module(x, chosen, weights), expected, atol=1e-4, rtol=1e-4)
    assert isinstance(module, CiuicExperts) and isinstance(module, Experts)
    restored = module.restore(torch.float32)
    assert type(restored) is Experts and torch.equal(restored.gate_up_proj, gate_up)


def test_a_packed_tensor_of_another_shape_is_refused() -> None:
    module = CiuicLinear.adopt(nn.Linear(128, 64))
    with pytest.raises(CiuicError, match=r"\[64, 128\].*\[64, 64\]"):
        module.set_packed("weight", pack(torch.randn(64, 64)))


def _flag(name: str, value: Any) -> Callable[[Experts], None]:
    return lambda experts: setattr(experts, name, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_flag("is_transposed", True), "transposed"),
        (_flag("has_bias", True), "biases"),
        (_flag("has_gate", False), "no gate"),
        (_flag("is_concatenated", False), "interleaved"),
        (_flag("extra", nn.Parameter(torch.ones(4, 2, 2))), "extra"),
        (_flag("down_proj", nn.Parameter(torch.ones(4, 40, 144))), "down_proj"),
    ],
)
def test_unsupported_layouts_have_a_reason(change: Callable[[Experts], None], words: str) -> None:
    experts = Experts(4, 40, 144)
    assert unsupported_reason(experts) == ""
    change(experts)
    assert words in unsupported_reason(experts)


def test_state_dict_round_trip() -> None:
    """Offsets that were derived from other tags are forgotten."""
    one, two = (CiuicLinear.adopt(nn.Linear(256, 64, bias=False)) for _ in range(2))
    one.set_packed("weight", pack(torch.randn(64, 256), "grid4_g32"))
    mixed = torch.tensor([[codec_by_name("grid8_g32").id, codec_by_name("zero").id]], dtype=torch.uint8)
    two.set_packed("weight", encode_tensor(torch.randn(64, 256), mixed))
    x = torch.randn(2, 256)
    one(x), two(x)
    state = {name: torch.empty_like(t).copy_(t) for name, t in two.state_dict().items()}
    target = CiuicLinear.adopt(nn.Linear(256, 64, bias=False))
    target.set_packed("weight", PackedTensor((64, 256), *(torch.zeros_like(t) for t in state.values())))
    target.load_state_dict(state)
    assert torch.equal(target(x), two(x))
