"""The product kernels against float64, in Triton's interpreter: ragged, empty, poisoned, split and whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given
from hypothesis import strategies as st

from ciuic_kernels import ops
from ciuic_kernels.codecs.grid import GRIDS, MAX_EXPONENT, MIN_EXPONENT
from ciuic_kernels.selection import Launch
from ciuic_kernels.triton.experts import tiles_by_expert
from ciuic_kernels.triton.linear import linear
from tests.examples import few
from tests.kernels.operands import Operand, activations
from tests.kernels.samples import SAMPLED, arranged, packed_sample
from tests.kernels.tolerances import assert_product
from tests.triton.interpreted import counters, gpu_kernels, needs_interpreter, operand_of, random_ids, sample

pytestmark = needs_interpreter
HALF = torch.float16
FEW = few(5, phases=[Phase.explicit, Phase.generate])  # interpreted kernels are slow, also to shrink


def assert_routed(y: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, w: Operand) -> None:
    fan = ids.numel() // x.shape[0]
    for row, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < w.dense.shape[0]:
            assert_product(y[row : row + 1], x[row // fan : row // fan + 1], w.dense[expert])
        else:
            assert not y[row].any()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("codec", GRIDS.values(), ids=lambda codec: codec.name)
def test_full_blocks_of_each_grid(codec: object, tokens: int, poisoned_empty: None) -> None:
    """Few tokens, and tiles of 64, where scales meet the weights: in the interpreter also of float16."""
    w = sample((64, 256), codecs=(codec.name,))  # type: ignore[attr-defined]
    x = activations(tokens, 256, dtype=HALF)
    with gpu_kernels():
        assert_product(ops.linear(x, *w.stored, None, w.rows, w.cols), x, w.dense)


@FEW
@given(
    st.integers(1, 140),
    st.sampled_from([1, 40, 128, 200, 256, 300]),
    st.integers(1, 20),
    st.integers(0, 2**16),
    st.booleans(),
)
def test_blocks_of_all_codecs(rows: int, cols: int, tokens: int, seed: int, with_bias: bool) -> None:
    w = sample((rows, cols), seed)
    x = activations(tokens, cols, dtype=HALF, seed=seed)
    bias = activations(rows, dtype=HALF, seed=seed + 1) if with_bias else None
    with gpu_kernels():
        y = ops.linear(x, *w.stored, bias, w.rows, w.cols)
    assert_product(y, x, w.dense, bias)
    assert not counters(w).any()


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 17, 33, 65, 256, 257])
def test_every_number_of_tokens(tokens: int, poisoned_empty: None) -> None:
    """Each rule of the default table, the tiles of tokens, and decode-then-GEMM."""
    w = sample((128, 128), codecs=("grid4_g64", "grid3_g32"))
    x = activations(tokens, 128, dtype=HALF)
    with gpu_kernels():
        y = ops.linear(x, *w.stored, None, w.rows, w.cols)
    assert y.shape == (tokens, 128)
    if tokens:
        assert_product(y, x, w.dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_multiplied_densely(dtype: torch.dtype) -> None:
    w = sample((64, 128), codecs=("grid4_g64",))
    x = activations(2, 128, dtype=torch.float32).to(dtype)
    with gpu_kernels():
        y = ops.linear(x, *w.stored, None, w.rows, w.cols)
    torch.testing.assert_close(y, x @ w.dense.to(dtype).t(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_any_layout_of_x(layout: str) -> None:
    w = sample((70, 160), codecs=("grid4_g64", "raw_fp16"))
    x = activations(5, 160, dtype=HALF)
    with gpu_kernels():
        y = ops.linear(arranged(x, layout), *w.stored, None, w.rows, w.cols)
    assert_product(y, x, w.dense)


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_shares_of_a_strip(programs: int, poisoned_empty: None) -> None:
    """However many programs share a strip: the same product, the same bits each time, counters back at zero."""
    packed = packed_sample((128, 640), 3, ("grid2_g64", "grid4_g64", "zero"))
    w = operand_of(packed)
    x = activations(4, 640, dtype=HALF)

    def product() -> torch.Tensor:
        launch = Launch(8, 1, 3, programs)
        return linear(
            x=x, arena=w.arena, tags=w.tags, work=w.derived.work, kinds=w.derived.kinds, bias=None, rows=128,
            launch=launch,
        )  # fmt: skip

    first, second = product(), product()
    assert_product(first, x, w.dense)
    assert torch.equal(first, second)
    assert not counters(w).any()


def test_strips_of_empty_blocks_give_zeros(poisoned_empty: None) -> None:
    w = sample((130, 200), codecs=("zero",))
    bias = activations(130, dtype=HALF)
    with gpu_kernels():
        y = ops.linear(activations(3, 200, dtype=HALF), *w.stored, bias, w.rows, w.cols)
    assert torch.equal(y, bias.expand(3, -1))


def test_offsets_beyond_two_gigabytes() -> None:
    """A record that lies 3 GiB into its arena (whose other pages are never touched)."""
    packed = packed_sample((64, 128), 1, ("grid4_g64",))
    far = 3 << 30
    arena = torch.empty(far + packed.arena.numel(), dtype=torch.uint8)
    arena[far:] = packed.arena
    w = operand_of(packed)
    work = w.derived.work.clone()
    work[0] = far // 16
    x = activations(2, 128, dtype=HALF)
    with gpu_kernels():
        stored = (arena, w.tags, w.derived.offsets, work, w.derived.kinds)
        assert_product(ops.linear(x, *stored, None, 64, 128), x, w.dense)
        assert torch.equal(ops.dequantize(*stored, 64, 128, torch.float32), w.dense)


@FEW
@given(
    st.sampled_from([(3, 70, 200), (5, 64, 128)]),
    st.sampled_from([(1, 1), (3, 2), (9, 3), (5, 13), (30, 3)]),
    st.integers(0, 2**16),
    st.booleans(),
)
def test_routed_rows(
    shape: tuple[int, int, int], routing: tuple[int, int], seed: int, shared_x: bool
) -> None:
    """Few pairs and many, ids that no expert has, experts that nobody is routed to, one x for each row or for k."""
    w = sample(shape, seed, ("grid4_g64", "grid3_g64", "raw_fp16", "zero"))
    ids = random_ids(routing, shape[0], seed)
    x = activations(routing[0] if shared_x else ids.numel(), shape[2], dtype=HALF, seed=seed)
    with gpu_kernels():
        y = ops.expert_linear(x, ids, *w.stored, w.rows, w.cols)
    assert_routed(y, x, ids, w)
    assert not counters(w).any()


@pytest.mark.parametrize("tokens", [2, 40])
def test_only_routed_experts_are_read(tokens: int, poisoned_empty: None) -> None:
    """NaN in the records of other experts stays where it is."""
    w = sample((4, 64, 128), codecs=("raw_fp16",))
    arena = w.arena.clone()
    arena[: w.arena.numel() // 4] = 255
    arena[3 * w.arena.numel() // 4 :] = 255
    ids = torch.tensor([[1, 2]]).expand(tokens, 2).contiguous()
    x = activations(tokens, 128, dtype=HALF)
    with gpu_kernels():
        y = ops.expert_linear(x, ids, arena, w.tags, *w.derived, w.rows, w.cols)
    assert_routed(y, x, ids, w)


@given(st.integers(1, 200), st.integers(1, 9), st.sampled_from([8, 16]), st.integers(0, 2**16))
def test_tiles_by_expert(pairs: int, experts: int, block_m: int, seed: int) -> None:
    """Every pair with an expert is in exactly one tile of that expert, and no tile is too large."""
    ids = random_ids((pairs,), experts, seed)
    order, tiles = tiles_by_expert(ids, experts, block_m)
    served = []
    for expert, first, count in tiles.tolist():
        if expert < experts:
            members = order[first : first + count].tolist()
            assert len(members) == count <= block_m
            assert all(int(ids[pair]) == expert for pair in members)
            served += members
    assert sorted(served) == [pair for pair, expert in enumerate(ids.tolist()) if 0 <= expert < experts]


@given(st.integers(1, 100), st.integers(1, 200), st.integers(0, 2**16))
@FEW
def test_decoding_is_exact(rows: int, cols: int, seed: int) -> None:
    w = sample((rows, cols), seed)
    ids = torch.randint(rows, (6,), generator=torch.Generator().manual_seed(seed))
    with gpu_kernels():
        for dtype in (torch.float32, torch.float16):
            dense = ops.dequantize(*w.stored, w.rows, w.cols, dtype)
            assert torch.equal(dense, w.dense.to(dtype))
        assert torch.equal(ops.embedding(ids, *w.stored, w.rows, w.cols, torch.float32), w.dense[ids])


def test_decoding_any_bytes_of_a_grid_is_exact() -> None:
    """Whatever codes and scales say, at both ends of the exponents: the codec's float32, signs of zeros included."""
    for codec in GRIDS.values():
        packed = packed_sample((64, 256), 0, (codec.name,))
        packed.arena.copy_(
            torch.randint(256, packed.arena.shape, generator=torch.Generator().manual_seed(codec.id))
        )
        packed.tags[..., 1] = torch.tensor([MIN_EXPONENT, MAX_EXPONENT])
        w = operand_of(packed)
        with gpu_kernels():
            dense = ops.dequantize(*w.stored, w.rows, w.cols, torch.float32)
        assert torch.equal(dense.view(torch.int32), w.dense.view(torch.int32)), codec.name


def test_decoding_experts_is_exact(poisoned_empty: None) -> None:
    w = sample((3, 70, 140), 2)
    with gpu_kernels():
        assert torch.equal(ops.dequantize(*w.stored, w.rows, w.cols, torch.float32), w.dense)


def test_ids_outside_a_table_give_nan() -> None:
    w = sample((70, 140), 2)
    ids = torch.tensor([[0, 69], [1, 2]])
    outside = torch.tensor([-1, 70, 1 << 40, 3])
    with gpu_kernels():
        rows = ops.embedding(ids, *w.stored, w.rows, w.cols, torch.float32)
        assert torch.equal(rows, w.dense[ids])
    from ciuic_kernels.triton.embedding import embedding

    rows = embedding(
        ids=outside,
        arena=w.arena,
        tags=w.tags,
        work=w.derived.work,
        kinds=w.derived.kinds,
        rows=70,
        cols=140,
        dtype=torch.float32,
    )
    assert rows[:3].isnan().all()
    assert torch.equal(rows[3], w.dense[3])


def test_gradient_through_the_kernels() -> None:
    w = sample((70, 256), codecs=("grid4_g64", "grid6_g32"))
    x = activations(3, 256, dtype=HALF).requires_grad_()
    grad = activations(3, 70, dtype=HALF, seed=2)
    with gpu_kernels():
        ops.linear(x, *w.stored, None, w.rows, w.cols).backward(grad)
    assert x.grad is not None
    assert_product(x.grad, grad, w.dense.t())


def test_all_codecs_are_covered() -> None:
    """The samples above are drawn from every codec that the tests sample: none can be forgotten."""
    packed = packed_sample((64 * 64, 128 * 4), 0)
    assert set(packed.tags[..., 0].flatten().tolist()) == {codec.id for codec in SAMPLED}
