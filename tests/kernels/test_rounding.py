"""Rounding with error feedback: what it stores is what the codecs allow, never worse, and better where it can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_kernels import BlockGrid, PackedTensor, all_codecs, codec_by_name
from ciuic_kernels.codec import GroupedCodec, PruningCodec
from ciuic_kernels.codecs.grid import GRIDS, GridCodec, levels
from ciuic_kernels.codecs.sparse import SPARSE
from ciuic_kernels.layout import validate
from ciuic_kernels.packing import allocate, decode_tensor, encode_matrix, encode_tensor
from ciuic_kernels.rounding import (
    DAMPING,
    RoundingError,
    _encode_columns,
    encode_matrix_rounded,
    feedback_of,
)
from tests.kernels.samples import implementation

NAMES = [
    "grid2_g64", "grid2_g32", "grid3_g32", "grid4_g64", "grid5_g32", "grid6_g64", "grid8_g32",
    "raw_bf16", "zero", "sparse4_d16",
]  # fmt: skip


def correlated(tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """Moments ``[K, K]`` of inputs with a few strong directions and a few features that are always 0."""
    mixing = torch.randn(width, max(1, width // 4), generator=generator)
    x = torch.randn(tokens, mixing.shape[1], generator=generator) @ mixing.T
    x += 0.1 * torch.randn(tokens, width, generator=generator)
    x[:, ::17] = 0
    return x.T @ x / tokens


def error(weight: Tensor, packed: PackedTensor, moments: Tensor) -> float:
    difference = weight.double() - decode_tensor(packed).double()
    return float(((difference @ moments.double()) * difference).sum())


def rounded(weight: Tensor, ids: Tensor, moments: Tensor) -> tuple[PackedTensor, RoundingError]:
    packed, offsets = allocate(ids, BlockGrid(tuple(weight.shape)), "cpu")
    return packed, encode_matrix_rounded(packed, offsets, 0, weight, feedback_of(moments))


def columns(weight: Tensor, ids: Tensor, upper: Tensor, name: str) -> tuple[PackedTensor, Tensor]:
    """Every block rounded by one implementation, whether that helps or not, and the errors that are passed on."""
    packed, _ = allocate(ids, BlockGrid(tuple(weight.shape)), "cpu")
    packed.arena.fill_(0xAA)
    with implementation(name):
        return packed, _encode_columns(weight, packed, upper)


def damped(moments: Tensor) -> Tensor:
    return moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([1e-30, 1.0, 1e20]),
    st.booleans(),
)  # fmt: skip
def test_never_worse_than_plain_and_valid(
    rows: int, cols: int, seed: int, size: float, heavy_tails: bool
) -> None:
    """Any shape, any mix of codecs: a valid record of the same codecs, whose error is what was reported."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight = (weight**5 if heavy_tails else weight) * size
    grid = BlockGrid((rows, cols))
    ids = torch.tensor([codec_by_name(name).id for name in NAMES], dtype=torch.uint8)
    ids = ids[torch.randint(len(NAMES), (grid.strips, grid.kblocks), generator=generator)]
    moments = correlated(64, cols, generator)
    moments = moments if float(moments.sum()) else torch.ones(cols, cols)
    packed, found = rounded(weight, ids, moments)
    validate(packed)
    assert torch.equal(packed.tags[..., 0], ids)
    plain = encode_tensor(weight, ids)
    assert packed.arena.shape == plain.arena.shape
    exact = error(weight, plain, damped(moments)), error(weight, packed, damped(moments))
    assert found.nearest == pytest.approx(exact[0], rel=1e-2, abs=1e-6 * size**2)
    assert found.stored == pytest.approx(exact[1], rel=1e-2, abs=1e-6 * size**2)
    assert found.stored <= found.nearest


@pytest.mark.usefixtures("compiled")
@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 150), st.integers(1, 64), st.integers(0, 10**6), st.sampled_from(list(GRIDS.values())),
    st.sampled_from([1e-30, 1.0, 1e20]), st.booleans(),
)  # fmt: skip
def test_compiled_code_rounds_a_group_bit_for_bit(
    rows: int, cols: int, seed: int, codec: GridCodec, size: float, heavy_tails: bool
) -> None:
    generator, cols = torch.Generator().manual_seed(seed), min(cols, codec.group)
    weight = torch.randn(rows, cols, generator=generator)
    weight = (weight**5 if heavy_tails else weight) * size
    weight[:, ::5] = 0
    moments = correlated(64, cols, generator) + 0.01 * torch.eye(cols)
    ids = torch.full((-(-rows // 64), 1), codec.id, dtype=torch.uint8)
    upper = feedback_of(moments)
    fast, slow = (columns(weight, ids, upper, name)[0] for name in ("compiled", "reference"))
    assert torch.equal(fast.arena, slow.arena) and torch.equal(fast.tags, slow.tags)


@pytest.mark.parametrize("name", ["compiled", "reference"])
@pytest.mark.parametrize("shape", [(150, 300), (64, 33), (7, 129)])
def test_the_errors_passed_on_are_those_of_what_is_stored(
    shape: tuple[int, int], name: str, request: pytest.FixtureRequest
) -> None:
    """``W - Q = e U`` over blocks of all codecs; the two implementations differ in sums from group to group only."""
    request.getfixturevalue("compiled")
    generator = torch.Generator().manual_seed(3)
    grid, weight = BlockGrid(shape), torch.randn(*shape, generator=generator)
    names = torch.tensor([codec_by_name(n).id for n in NAMES], dtype=torch.uint8)
    ids = names[torch.randint(len(names), (grid.strips, grid.kblocks), generator=generator)]
    upper = feedback_of(correlated(512, shape[1], generator))
    packed, errors = columns(weight, ids, upper, name)
    validate(packed)
    found, wanted = errors.double() @ upper.double(), weight.double() - decode_tensor(packed).double()
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)  # 300 terms of float32, all below 10
    other, _ = columns(weight, ids, upper, "reference")
    assert float((decode_tensor(packed) == decode_tensor(other)).float().mean()) > 0.98


@pytest.mark.parametrize("width", [1, 255, 256, 600])
def test_feedback_is_the_factor_of_the_inverse(width: int) -> None:
    moments = correlated(2000, width, torch.Generator().manual_seed(0)) + torch.eye(width)
    upper = feedback_of(moments).double()
    assert torch.equal(upper, upper.triu())
    product = upper.T @ upper @ damped(moments.double())
    torch.testing.assert_close(product, torch.eye(width).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES[:7])
def test_what_correlated_inputs_gain(name: str) -> None:
    """A quarter as many directions as inputs: most of the error can be moved to where it does not show."""
    generator = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(128, 256, generator=generator), correlated(4096, 256, generator)
    ids = torch.full((2, 2), codec_by_name(name).id, dtype=torch.uint8)
    _, found = rounded(weight, ids, moments)
    assert found.stored < 0.6 * found.nearest


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 100), st.integers(1, 200), st.integers(0, 10**6), st.sampled_from(list(SPARSE)),
    st.floats(0, 0.9),
)  # fmt: skip
def test_sparse_blocks_keep_to_their_capacity(
    rows: int, cols: int, seed: int, kind: tuple[int, int], zeros: float
) -> None:
    """Never more weights than fit, never worse than by magnitude, and a record that any reader takes."""
    generator, codec = torch.Generator().manual_seed(seed), SPARSE[kind]
    weight = torch.randn(rows, cols, generator=generator)
    weight *= torch.rand(rows, cols, generator=generator) >= zeros
    moments = correlated(64, cols, generator)
    moments = moments if float(moments.sum()) else torch.ones(cols, cols)
    grid = BlockGrid((rows, cols))
    packed, found = rounded(
        weight, torch.full((grid.strips, grid.kblocks), codec.id, dtype=torch.uint8), moments
    )
    validate(packed)
    assert found.stored <= found.nearest
    for strip in decode_tensor(packed).split(64):
        for block in strip.split(128, 1):
            assert int(block.count_nonzero()) <= codec.slots(*block.shape)


@pytest.mark.parametrize(("capacity", "gain"), [(16, 0.65), (10, 0.7)])
def test_what_pruning_gains_from_correlated_inputs(capacity: int, gain: float) -> None:
    """Half and 70 % of the weights go; those that stay make a part of it good, where inputs are correlated."""
    generator = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(128, 256, generator=generator), correlated(4096, 256, generator)
    ids = torch.full((2, 2), SPARSE[4, capacity].id, dtype=torch.uint8)
    packed, found = rounded(weight, ids, moments)
    assert found.stored < gain * found.nearest
    assert not torch.equal(decode_tensor(packed) != 0, decode_tensor(encode_tensor(weight, ids)) != 0)


def test_pruning_without_correlation_is_by_magnitude() -> None:
    """All inputs alike and independent: the mask is that of plain encoding."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 1), SPARSE[5, 12].id, dtype=torch.uint8)
    packed, _ = rounded(weight, ids, torch.eye(128))
    assert torch.equal(decode_tensor(packed) != 0, decode_tensor(encode_tensor(weight, ids)) != 0)


def test_independent_inputs_gain_only_scales() -> None:
    """Without correlation there is nothing to pass on: nothing is lost against the plain search, bit for bit or by
    more than what its coarser choice of exponents costs."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    ids = torch.full((1, 1), codec_by_name("grid4_g32").id, dtype=torch.uint8)
    packed, found = rounded(weight, ids, torch.eye(128))
    assert 0.98 * found.nearest < found.stored <= found.nearest
    assert error(weight, packed, torch.eye(128)) <= error(weight, encode_tensor(weight, ids), torch.eye(128))


def test_a_strip_that_plain_rounding_serves_better_keeps_its_bytes() -> None:
    """Weights on the grid already have no error that could fall."""
    generator = torch.Generator().manual_seed(0)
    weight, moments = torch.randn(128, 128, generator=generator), correlated(512, 128, generator)
    codes = torch.randint(8, (64, 128), generator=generator)
    codes[:, ::32] = 0  # the outermost level, so that the scale is found
    weight[:64] = levels(3)[codes]
    ids = torch.full((2, 1), codec_by_name("grid3_g32").id, dtype=torch.uint8)
    packed, found = rounded(weight, ids, moments)
    plain = encode_tensor(weight, ids)
    half = len(plain.arena) // 2
    assert torch.equal(decode_tensor(plain)[:64], weight[:64])
    assert torch.equal(packed.arena[:half], plain.arena[:half]) and torch.equal(packed.tags[0], plain.tags[0])
    assert not torch.equal(packed.arena[half:], plain.arena[half:])
    assert found.stored < found.nearest


def test_rows_may_come_in_parts_and_runs_repeat() -> None:
    """Strips are independent of each other, apart from the order of sums in a product."""
    generator = torch.Generator().manual_seed(1)
    weight, moments = torch.randn(200, 192, generator=generator).bfloat16(), correlated(512, 192, generator)
    ids = torch.full((4, 2), codec_by_name("grid3_g64").id, dtype=torch.uint8)
    whole, found = rounded(weight, ids, moments)
    again, _ = rounded(weight, ids, moments)
    assert torch.equal(whole.arena, again.arena) and torch.equal(whole.tags, again.tags)
    parts, offsets = allocate(ids, BlockGrid((200, 192)), "cpu")
    feedback = feedback_of(moments)
    total = encode_matrix_rounded(parts, offsets, 0, weight[:128], feedback)
    total += encode_matrix_rounded(parts, offsets, 0, weight[128:], feedback, 128)
    assert total.stored == pytest.approx(found.stored, rel=1e-2)
    assert float((decode_tensor(parts) == decode_tensor(whole)).float().mean()) > 0.99


def test_experts_are_rounded_one_by_one() -> None:
    generator = torch.Generator().manual_seed(2)
    weight, moments = torch.randn(3, 70, 130, generator=generator), correlated(512, 130, generator)
    ids = torch.full((3, 2, 2), codec_by_name("grid3_g64").id, dtype=torch.uint8)
    packed, offsets = allocate(ids, BlockGrid((3, 70, 130)), "cpu")
    encode_matrix(packed, offsets, 0, weight[0])
    for index in (1, 2):
        encode_matrix_rounded(packed, offsets, index, weight[index], feedback_of(moments))
    for index in (1, 2):
        alone, _ = rounded(weight[index], ids[index], moments)
        assert torch.equal(decode_tensor(packed)[index], decode_tensor(alone))
    assert torch.equal(decode_tensor(packed)[0], decode_tensor(encode_tensor(weight[0], ids[0])))


@pytest.mark.parametrize(("protocol", "prefix"), [(GroupedCodec, "grid"), (PruningCodec, "sparse")])
def test_every_grid_can_be_rounded_and_every_sparse_codec_prunes(protocol: type, prefix: str) -> None:
    found = {codec.name for codec in all_codecs() if isinstance(codec, protocol)}
    assert found == {codec.name for codec in all_codecs() if codec.name.startswith(prefix)}


@pytest.mark.parametrize("moments", [torch.zeros(4, 4), torch.full((4, 4), float("nan"))])
def test_moments_that_say_nothing_are_refused(moments: Tensor) -> None:
    with pytest.raises(ValueError, match="finite and not all zero"):
        feedback_of(moments)


def test_moments_of_another_width_are_refused() -> None:
    ids = torch.full((1, 1), codec_by_name("grid3_g64").id, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"moments are of 5 inputs and the matrix \[8, 6\] has 6"):
        packed, offsets = allocate(ids, BlockGrid((8, 6)), "cpu")
        encode_matrix_rounded(packed, offsets, 0, torch.ones(8, 6), feedback_of(torch.eye(5)))
