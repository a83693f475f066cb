"""The peers are at least as good as they were measured elsewhere, store what they are charged for, and keep shapes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ciuic_hf.bench.peers import kquants
from ciuic_hf.bench.peers.catalogue import PEERS, matrices, replace_weights
from ciuic_hf.bench.quality import compare

BY_NAME = {peer.name: peer for peer in PEERS}

# |W - Q|^2 / |W|^2 on normal weights, of independent implementations (docs/adr/022).
MEASURED = {
    "bitsandbytes NF4": 0.0085,
    "HQQ 4 bits": 0.0076,
    "HQQ 3 bits": 0.0334,
    "HQQ 2 bits": 0.1888,
    "GGUF Q6_K": 0.00030,
    "GGUF Q5_K": 0.00144,
    "GGUF Q4_K": 0.0055,
    "GGUF Q3_K": 0.0210,
    "GGUF Q2_K": 0.0761,
}
SCALE_BITS = {
    "Q2_K": (16, 4, 4),
    "Q3_K": (16, 6, 0),
    "Q4_K": (8, 6, 6),
    "Q5_K": (8, 6, 6),
    "Q6_K": (16, 8, 0),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_peer_is_no_weaker_than_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By squared error, which a search without importance minimises."""
    monkeypatch.setattr(kquants, "Q2_POWER", 0.0)
    weights = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    error = (BY_NAME[name].roundtrip(weights) - weights).square().sum() / weights.square().sum()
    assert float(error) <= 1.03 * MEASURED[name]


@pytest.mark.parametrize("name", SCALE_BITS)
def test_a_super_block_holds_what_its_bits_are_counted_for(name: str) -> None:
    width = int(name[1])
    sub_blocks, scale_bits, min_bits = SCALE_BITS[name]
    values = torch.randn(7, 256, generator=torch.Generator().manual_seed(1)) * torch.tensor(3.0).pow(
        torch.arange(7)[:, None]
    )
    values[3] = 0
    found = kquants.FORMATS[name].encode(values)
    low = 0 if min_bits else -(2 ** (width - 1))
    assert low <= int(found.codes.min()) and int(found.codes.max()) < low + 2**width
    low = 0 if min_bits else -(2 ** (scale_bits - 1))
    assert low <= int(found.scales.min()) and int(found.scales.max()) < low + 2**scale_bits
    assert int(found.minima.min()) >= 0 and int(found.minima.max()) < max(1, 2**min_bits)
    assert found.scales.shape == (7, sub_blocks) and found.step.dtype == found.min_step.dtype == torch.float16
    stored = 256 * width + sub_blocks * (scale_bits + min_bits) + 16 * (2 if min_bits else 1)
    assert stored / 256 == kquants.FORMATS[name].bits


@given(peer=st.sampled_from(PEERS), seed=st.integers(0, 100), exponent=st.integers(-8, 4))
@settings(max_examples=25, deadline=None)
def test_shapes_dtypes_and_zeros_survive(peer: Any, seed: int, exponent: int) -> None:
    weights = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    weights[1] = 0
    before = weights.clone()
    decoded = peer.roundtrip(weights.bfloat16())
    assert decoded.shape == weights.shape and decoded.dtype == torch.bfloat16
    assert bool(decoded.isfinite().all()) and torch.equal(weights, before)
    assert float(decoded[1].abs().max()) <= 0.5 * 2.0**exponent


def test_more_bits_are_closer() -> None:
    weights = torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    for family in ("HQQ", "GGUF"):
        peers = sorted((p for p in PEERS if p.family == family), key=lambda p: p.bits)
        errors = [float((p.roundtrip(weights) - weights).square().sum()) for p in peers]
        assert errors == sorted(errors, reverse=True)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(2, 64, 64))


def test_linears_and_experts_are_replaced_and_nothing_else() -> None:
    model = nn.ModuleDict(
        {"up": nn.Linear(64, 64), "experts": Experts(), "lm_head": nn.Linear(64, 8), "e": nn.Embedding(8, 64)}
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert set(matrices(model)) == {"up.weight", "experts.down_proj"}
    replace_weights(model, BY_NAME["GGUF Q4_K"], before)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"up.weight", "experts.down_proj"}


class Predicts(nn.Module):
    """Puts most probability on the token that is ``step`` above the last one."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(float(step)))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        wanted = (input_ids + int(self.step)) % 8
        return SimpleNamespace(logits=nn.functional.one_hot(wanted, 8).float())


def test_accuracy_counts_next_tokens_inside_windows() -> None:
    ids = (torch.arange(21) % 8)[None]
    ids[0, 4] = 7  # two predictions, of it and from it, go wrong
    found = compare(Predicts(1).eval(), Predicts(2).eval(), ids, window=7)
    assert found.reference_accuracy == pytest.approx(16 / 18) and found.accuracy == 0.0
    assert found.top1_agreement == 0.0
