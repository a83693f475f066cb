"""Several products in one launch against float64 and against launches of their own, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ciuic_kernels import ops
from ciuic_kernels.codecs.grid import GRIDS
from ciuic_kernels.selection import Launch, shares_launch
from ciuic_kernels.triton import linears as kernels
from ciuic_kernels.work import ANY, ANY_SPARSE
from tests.kernels.operands import Operand, activations, together
from tests.kernels.tolerances import assert_product
from tests.triton.interpreted import counters, gpu_kernels, needs_interpreter, sample
from tests.triton.test_products import FEW

pytestmark = needs_interpreter
HALF = torch.float16
ONE_GRID, TWO_GRIDS, EDGES = ("grid4_g64",), ("grid4_g64", "grid3_g32"), ("grid4_g64", "raw_fp16", "zero")
MANY = ("grid2_g64", "grid3_g64", "grid5_g64", "grid6_g64", "grid8_g64", "grid2_g32")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are started for linears, in order."""
    from ciuic_kernels.triton import linear

    seen: list[str] = []
    for module in (linear, kernels):

        def start(kernel: Any, *arguments: Any, _start: Any = module.start, **settings: Any) -> None:
            seen.append(kernel.fn.__name__)
            _start(kernel, *arguments, **settings)

        monkeypatch.setattr(module, "start", start)
    return seen


def products(
    x: torch.Tensor, operands: list[Operand], biases: list[torch.Tensor | None]
) -> list[torch.Tensor]:
    given_biases = [bias for bias in biases if bias is not None]
    rows = [w.rows for w in operands]
    has_bias = [bias is not None for bias in biases]
    with gpu_kernels():
        return ops.linears(x, *together(operands), given_biases, has_bias, rows, x.shape[-1])


@FEW
@given(
    st.lists(st.tuples(st.integers(1, 140), st.sampled_from([ONE_GRID, EDGES])), min_size=2, max_size=3),
    st.sampled_from([40, 128, 300]),
    st.integers(1, 20),
    st.integers(0, 2**16),
    st.sampled_from([0, 1, 2, 7]),
)
def test_products_of_any_sizes(
    matrices: list[tuple[int, tuple[str, ...]]], cols: int, tokens: int, seed: int, biased: int
) -> None:
    operands = [sample((rows, cols), seed + i, codecs) for i, (rows, codecs) in enumerate(matrices)]
    x = activations(tokens, cols, dtype=HALF, seed=seed)
    biases = [
        activations(w.rows, dtype=HALF, seed=seed + i) if biased >> i & 1 else None
        for i, w in enumerate(operands)
    ]
    for y, w, bias in zip(products(x, operands, biases), operands, biases, strict=True):
        assert_product(y, x, w.dense, bias)
        assert y.is_contiguous()
        assert not counters(w).any()


@pytest.mark.parametrize(
    ("codecs", "shared"),
    [
        ((ONE_GRID, ONE_GRID, ONE_GRID), True),
        ((ONE_GRID, ("grid6_g32",), TWO_GRIDS), False),
        ((ONE_GRID, ("grid6_g32",)), True),
        ((MANY, ONE_GRID), True),
        ((("zero",), ("zero",)), True),
    ],
)
def test_what_shares_a_launch(
    codecs: tuple[tuple[str, ...], ...], shared: bool, launches: list[str], poisoned_empty: None
) -> None:
    operands = [sample((64, 512), seed, own) for seed, own in enumerate(codecs)]
    x = activations(2, 512, dtype=HALF)
    for y, w in zip(products(x, operands, [None] * len(operands)), operands, strict=True):
        assert_product(y, x, w.dense)
    assert launches == (["linears_kernel"] if shared else ["linear_kernel"] * len(operands))


@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 17, 32, 33])
def test_every_number_of_tokens(tokens: int, launches: list[str], poisoned_empty: None) -> None:
    operands = [sample((rows, 128), rows, ONE_GRID) for rows in (64, 70)]
    x = activations(1, tokens, 128, dtype=HALF)
    for y, w in zip(products(x, operands, [None] * 2), operands, strict=True):
        assert y.shape == (1, tokens, w.rows)
        if tokens:
            assert_product(y[0], x[0], w.dense)
    assert launches.count("linears_kernel") == (0 < tokens <= 32)


@pytest.mark.parametrize("programs", [1, 5, 64])
def test_the_bits_are_those_of_separate_launches_with_the_same_parts(programs: int) -> None:
    """A program does what a program of the single kernel does, so only the number of parts can change a sum."""
    from ciuic_kernels.triton.linear import linear

    operands = [sample((rows, 640), rows, EDGES) for rows in (64, 40)]
    x = activations(4, 640, dtype=HALF)
    fields = {"x": x, "launch": Launch(8, 1, 3, programs)}
    outs = [
        kernels.linears(
            arenas=[w.arena for w in operands], tags=[w.tags for w in operands],
            works=[w.derived.work for w in operands], biases=[None, None], rows=[64, 40],
            kinds=sorted({kind for w in operands for kind in w.derived.kinds}), **fields,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))
    if programs == 1:
        for y, w in zip(outs[0], operands, strict=True):
            alone = linear(
                arena=w.arena, tags=w.tags, work=w.derived.work, kinds=w.derived.kinds, bias=None, rows=w.rows, **fields
            )  # fmt: skip
            assert torch.equal(y, alone)


def test_gradients_are_those_of_separate_products() -> None:
    operands = [sample((rows, 256), rows, TWO_GRIDS) for rows in (70, 64)]
    grads = [activations(3, w.rows, dtype=HALF, seed=w.rows) for w in operands]
    leaves = [activations(3, 256, dtype=HALF).requires_grad_() for _ in range(2)]
    biases = [activations(64, dtype=HALF).requires_grad_() for _ in range(2)]
    torch.autograd.backward(products(leaves[0], operands, [None, biases[0]]), grads)
    with gpu_kernels():
        apart = [
            ops.linear(leaves[1], *w.stored, bias, w.rows, w.cols)
            for w, bias in zip(operands, (None, biases[1]), strict=True)
        ]
    torch.autograd.backward(apart, grads)
    assert torch.equal(biases[0].grad, biases[1].grad)
    assert_product(leaves[0].grad, torch.cat(grads, 1), torch.cat([w.dense for w in operands]).t())
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=0.05, rtol=0.01)


def test_lists_of_different_lengths_are_refused() -> None:
    w = sample((64, 128), codecs=ONE_GRID)
    x = activations(2, 128, dtype=HALF)
    with pytest.raises(ValueError, match="one entry for each matrix"):
        ops.linears(x, *together([w, w]), [], [False], [64, 64], 128)
    with pytest.raises(ValueError, match="0 biases for the 1"):
        ops.linears(x, *together([w, w]), [], [True, False], [64, 64], 128)


def test_sharing_is_decided_by_tile_and_kinds() -> None:
    grids = [grid.id for grid in GRIDS.values()]
    few, many = Launch(32, 2, 4, 8), Launch(64, 4, 4, 8)
    one, all_of_them = [grids[0]], grids
    assert shares_launch(few, [one, [*one, ANY], [grids[1], ANY_SPARSE]])
    assert not shares_launch(many, [one, one])
    assert not shares_launch(few, [[grids[0]], [grids[1]], [grids[2]]])
    assert shares_launch(few, [all_of_them, [*one, ANY]])
    assert not shares_launch(few, [one])
