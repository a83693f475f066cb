"""The attention kernel and the reference of its operator against float64, where there is no GPU in the interpreter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CACHE_BITS
from ciuic_kernels import ops
from ciuic_kernels.attention import launch_of
from ciuic_kernels.ops.attend_packed import packed_shape
from tests.kernels.tolerances import assert_within
from tests.triton.interpreted import FACTS, needs_interpreter
from tests.triton.pages import Pages, Sizes, exact_attention, pages_of

pytestmark = needs_interpreter
LOWEST = torch.finfo(torch.float32).min
DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
BITS = [pytest.param(bits, marks=() if bits == 4 else pytest.mark.slow) for bits in CACHE_BITS]
RAGGED: Sizes = [(128, 128), (77, 128), (128, 256)]


def run(
    query: Tensor, rope: Tensor | None, pages: Pages, mask: Tensor | None, scale: float, **launch: Any
) -> tuple[Tensor, Tensor]:
    """The kernel, whatever the dtype."""
    from ciuic_kernels.triton.attention import attend_packed

    width = pages.keys.shape[-1] if rope is not None else pages.values.shape[-1]
    shape = packed_shape(
        query,
        pages.records,
        pages.table,
        rope is not None,
        pages.values.shape[-1],
        pages.codes[1],
        pages.codes[3],
    )
    return attend_packed(
        query=query, query_rope=rope, addresses=pages.addresses, pages=pages.table, count=pages.count, mask=mask,
        scale=scale, formats=pages.codes, width=width, shape=shape,
        launch=dataclasses.replace(launch_of(shape, FACTS.processors), **launch),
    )  # fmt: skip


def check(
    query: Tensor, rope: Tensor | None, pages: Pages, mask: Tensor | None = None, **launch: Any
) -> tuple[Tensor, Tensor]:
    exact = exact_attention(query, rope, pages, mask, 0.2)
    out, lse = run(query, rope, pages, mask, 0.2, **launch)
    assert_within(out, exact.out, exact.out_bound)
    sees = exact.lse > LOWEST
    assert_within(lse[sees], exact.lse[sees], exact.lse_bound[sees])
    assert (lse[~sees] == LOWEST).all() and (out[~sees] == 0).all()
    return out, lse


def queries(pages: Pages, group: int, new: int, dtype: torch.dtype) -> Tensor:
    batch, heads, _, width = pages.keys.shape
    return torch.randn(batch, heads * group, new, width).to(dtype)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_grouped_heads(bits: int, dtype: torch.dtype) -> None:
    pages = pages_of(bits, False, RAGGED, heads=1, widths=(40, 72))
    check(queries(pages, 4, 2, dtype), None, pages, splits=2)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_latents(bits: int, dtype: torch.dtype) -> None:
    sizes = [(128, 128), (27, 128)]
    pages = pages_of(bits, True, sizes, heads=1, widths=(136, 24))
    rope = torch.randn(2, 5, 2, 24).to(dtype)
    check(torch.randn(2, 5, 2, 136).to(dtype), rope, pages, splits=2)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("bits", "block_m", "block_t"), [(4, 32, 32), pytest.param(2, 64, 64, marks=pytest.mark.slow)]
)
def test_latents_in_tiles_of_more_queries(bits: int, block_m: int, block_t: int) -> None:
    """More queries than a tile, and fewer; a page ends in the middle of a tile of tokens."""
    pages = pages_of(bits, True, [(71, 128)], heads=1, widths=(40, 24), batch=1)
    for heads in (35, 3):
        check(
            torch.randn(1, heads, 1, 40),
            torch.randn(1, heads, 1, 24),
            pages,
            block_m=block_m,
            block_t=block_t,
        )


@pytest.mark.parametrize(("heads", "group", "new"), [(3, 1, 1), (1, 7, 1), (1, 7, 8)])
def test_queries_of_several_heads_and_tokens(heads: int, group: int, new: int) -> None:
    pages = pages_of(4, False, [(64, 64), (30, 64)], heads=heads, widths=(32, 16), batch=1)
    check(queries(pages, group, new, torch.float32), None, pages)


def mask_of(kind: str, tokens: int, new: int) -> Tensor:
    if kind == "padding":
        mask = torch.ones(2, 1, tokens + 5, dtype=torch.bool)
        mask[0, :, :70] = False  # the first page of 64 tokens and some of the next
        return mask
    mask = torch.rand(1, new, tokens) < 0.6
    mask[:, 0] = False
    return mask.mT.contiguous().mT  # any strides


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("kind", ["padding", "of each token"])
def test_hidden_tokens(kind: str, latent: bool) -> None:
    """A query that sees nothing gives zeros and the lowest log-sum-exp."""
    sizes = [(64, 64), (40, 64)]
    pages = pages_of(8, latent, sizes, heads=1, widths=(72, 24))
    rope = torch.randn(2, 3, 2, 24) if latent else None
    mask = mask_of(kind, 104, 2).expand(2, 2, -1)
    check(queries(pages, 3, 2, torch.float32), rope, pages, mask, splits=3)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, under the interpreter
@pytest.mark.parametrize("latent", [False, True])
def test_nan_in_hidden_tokens_is_not_seen(latent: bool) -> None:
    pages = pages_of(4, latent, [(64, 64), (64, 64)], heads=1, widths=(32, 24))
    parts = pages.addresses.shape[1]
    scale = pages.records[1 if latent else parts - 1]  # of the latents, or of the values, of the first page
    scale[:, :, :9] = 255  # NaN
    if not latent:
        pages.records[2].fill_(float("nan"))  # the lows of its keys
    mask = torch.ones(2, 1, 128, dtype=torch.bool)
    mask[..., : 9 if latent else 64] = False
    query, rope = queries(pages, 2, 1, torch.float32), torch.randn(2, 2, 1, 24) if latent else None
    check(query, rope, pages, mask)
    out, _ = run(query, rope, pages, None, 0.2)
    assert out.isnan().all(), "NaN that is seen must show"


@pytest.mark.parametrize("latent", [False, True])
def test_an_empty_history(latent: bool) -> None:
    pages = pages_of(4, latent, [(0, 64)], heads=1, widths=(32, 24))
    rope = torch.randn(2, 2, 1, 24) if latent else None
    check(queries(pages, 2, 1, torch.float32), rope, pages)
    pages.count.zero_()
    out, lse = run(queries(pages, 2, 1, torch.float32), rope, pages, None, 0.2)
    assert (out == 0).all() and (lse == LOWEST).all()


@pytest.mark.slow
def test_splits_change_rounding_and_another_run_nothing() -> None:
    pages = pages_of(4, False, [(128, 128), (64, 128)], heads=1, widths=(32, 24))
    query = queries(pages, 4, 1, torch.float32)
    results = [run(query, None, pages, None, 0.2, splits=splits) for splits in (1, 2, 3, 3)]
    assert torch.equal(results[2][0], results[3][0])
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, results[0][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bits", CACHE_BITS)
def test_the_reference(bits: int, latent: bool) -> None:
    """Pages one by one, and each part with a leading dimension of pages."""
    sizes = [(128, 128), (77, 128), (9, 128)]
    pages = pages_of(bits, latent, sizes, heads=1, widths=(72, 24))
    query, rope = queries(pages, 4, 2, torch.float32), torch.randn(2, 4, 2, 24) if latent else None
    mask = torch.rand(2, 2, 214) < 0.7
    exact = exact_attention(query, rope, pages, mask, 0.2)
    width, parts = 72 if latent else 24, pages.addresses.shape[1]
    out, lse = ops.attend_packed(query, rope, *pages.arguments, mask, 0.2, *pages.codes, width)
    assert_within(out, exact.out, exact.out_bound)
    assert_within(lse, exact.lse, exact.lse_bound)
    stacked = [torch.stack(pages.records[part::parts]) for part in range(parts)]
    addresses = ops.page_addresses(stacked, parts)
    assert addresses.shape == pages.addresses.shape and addresses[2, 1] == stacked[1][2].data_ptr()
    again = ops.attend_packed(
        query, rope, stacked, addresses, pages.table, pages.count, mask, 0.2, *pages.codes, width
    )
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
