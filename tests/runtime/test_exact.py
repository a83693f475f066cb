"""Bools and integers in fewer bytes: every value comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf import compress_activations
from ciuic_hf.runtime.exact import narrow, widen
from ciuic_hf.runtime.packing import stored_nbytes


@given(st.lists(st.booleans(), max_size=70))
def test_bools_are_bits(values: list[bool]) -> None:
    flat = torch.tensor(values, dtype=torch.bool)
    packed = narrow(flat)
    assert packed is not None and packed.nbytes == -(-len(values) // 8)
    assert torch.equal(widen(packed), flat) and widen(packed).dtype == torch.bool


@given(
    st.sampled_from([torch.int64, torch.int32, torch.int16]),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9),
    st.integers(0, 63),
)
def test_integers_come_back(dtype: torch.dtype, values: list[int], shift: int) -> None:
    flat = (torch.tensor(values) >> shift).to(dtype)
    packed = narrow(flat)
    if packed is None:
        assert int(flat.max()) > 255 or int(flat.min()) < 0
    else:
        assert packed.nbytes < flat.nbytes
        assert torch.equal(widen(packed), flat) and widen(packed).dtype == dtype


def test_what_has_no_narrower_type_is_left() -> None:
    for flat in (torch.ones(5, dtype=torch.uint8), torch.ones(5), torch.tensor([]).long()):
        assert narrow(flat) is None


@pytest.mark.parametrize("expanded", [False, True])
def test_masks_and_indices_of_a_graph_are_exact_and_small(expanded: bool) -> None:
    x = torch.randn(80, 100, requires_grad=True)
    mask = (torch.rand(1, 100) > 0.5).expand(80, 100) if expanded else torch.rand(80, 100) > 0.5
    index = torch.randint(0, 100, (80, 50))

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(x.masked_fill(mask, 0).gather(1, index).sum(), x)[0]

    expected = gradient()
    with compress_activations(bits=2) as saved:
        assert torch.equal(gradient(), expected)
    # of the mask 8 to a byte, of the index one byte each; gather saves its input too
    assert saved.stored_nbytes <= (100 if expanded else 1000) + 4000 + stored_nbytes((80, 100), 2)
