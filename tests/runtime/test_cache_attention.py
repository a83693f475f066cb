"""Attention tile by tile against attention over the decoded whole, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ciuic_hf.planning.cache_formats import CACHE_BITS, cache_formats
from ciuic_hf.planning.tiles import LatentShape
from ciuic_hf.runtime.cache import attention, latent
from ciuic_hf.runtime.cache.attention import Mask, attend
from ciuic_hf.runtime.cache.latent import attend_latent
from ciuic_hf.runtime.cache.store import History, LayerStore

SHAPE = LatentShape(rank=40, nope=16, rope=8, value=24)


def history_of(
    bits: int, past: int, fresh: int, heads: int, widths: tuple[int, int], latent: bool = False
) -> History:
    keys, values = (torch.randn(2, heads, past + fresh, width) for width in widths)
    store = LayerStore(cache_formats(bits, latent))
    if past:
        store.append(keys[:, :, :past], values[:, :, :past])
    return History(store, keys[:, :, past:].clone(), values[:, :, past:].clone())


def hidden(mask: Mask, queries: int, length: int) -> Tensor:
    """What is added to scores ``[B, heads, Q, length]``."""
    seen = torch.ones(queries, length, dtype=torch.bool)
    if mask.causal:
        seen = seen.tril(length - queries)
    added = torch.zeros(1, 1, queries, length, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    if mask.padding is not None:
        added = added.masked_fill(~mask.padding[:, None, None, :length], float("-inf"))
    if mask.dense is not None:
        bias = mask.dense
        added = added + (
            bias if bias.dtype != torch.bool else torch.zeros(bias.shape).masked_fill(~bias, float("-inf"))
        )
    return added


def reference(query: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Mask) -> Tensor:
    """Zero where a query sees nothing."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(repeats, 1) for x in (keys, values))
    scores = query.double() @ keys.mT * scale + hidden(mask, query.shape[2], keys.shape[2])
    return torch.softmax(scores, -1).nan_to_num() @ values


MASKS = ["none", "causal", "padding", "dense", "dense heads", "bias"]


def make_mask(kind: str, queries: int, length: int, heads: int) -> Mask:
    padding = torch.ones(2, length + 3, dtype=torch.bool)
    padding[0, : length // 3] = False
    if kind == "padding":
        return Mask(padding=padding)
    if kind.startswith("dense"):
        dense = torch.rand(2, heads if kind == "dense heads" else 1, queries, length) < 0.7
        return Mask(causal=False, dense=dense)
    if kind == "bias":
        return Mask(causal=False, dense=torch.randn(1, 1, queries, length))
    return Mask(causal=kind == "causal")


@settings(max_examples=30)
@given(
    bits=st.sampled_from(CACHE_BITS),
    past=st.sampled_from([0, 5, 200, 600]),
    queries=st.integers(1, 16),
    grouping=st.sampled_from([(1, 1), (2, 4), (3, 3)]),
    widths=st.sampled_from([(64, 64), (24, 40), (7, 20)]),
    kind=st.sampled_from(MASKS),
    tile=st.sampled_from([500, 1 << 21]),
)
def test_tiles_give_what_the_whole_gives(
    bits: int,
    past: int,
    queries: int,
    grouping: tuple[int, int],
    widths: tuple[int, int],
    kind: str,
    tile: int,
) -> None:
    cached, heads = grouping
    history = history_of(bits, past, queries, cached, widths)
    query = torch.randn(2, heads, queries, widths[0])
    mask = make_mask(kind, queries, past + queries, heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", tile)
        out = attend(query, history, 0.3, mask)
    expected = reference(query, history.dense(0), history.dense(1), 0.3, mask)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-4)


class Up:
    """``Wk`` and ``Wv`` of 4 heads."""

    def __init__(self, can_absorb: bool) -> None:
        self.can_absorb = can_absorb
        self.weight = torch.randn(4, SHAPE.nope + SHAPE.value, SHAPE.rank) * 0.2

    def absorb(self, query: Tensor) -> Tensor:
        return query @ self.weight[:, : SHAPE.nope]

    def project(self, latent: Tensor) -> Tensor:
        return latent @ self.weight[:, SHAPE.nope :].mT

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        heads = latent @ self.weight.mT
        return heads[..., : SHAPE.nope], heads[..., SHAPE.nope :]


@settings(max_examples=25)
@given(
    bits=st.sampled_from(CACHE_BITS),
    past=st.sampled_from([0, 40, 200, 600]),
    queries=st.integers(1, 16),
    absorbed=st.booleans(),
    kind=st.sampled_from(MASKS),
    tile=st.sampled_from([500, 1 << 21]),
)
def test_latents_absorbed_or_expanded_give_what_expanded_keys_give(
    bits: int, past: int, queries: int, absorbed: bool, kind: str, tile: int
) -> None:
    history = history_of(bits, past, queries, 1, (SHAPE.rank, SHAPE.rope), latent=True)
    query = torch.randn(2, 4, queries, SHAPE.nope + SHAPE.rope)
    mask = make_mask(kind, queries, past + queries, 4)
    up = Up(absorbed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "TILE", tile)
        patch.setattr(latent, "TILE", tile)
        patch.setattr(LatentShape, "absorbs", lambda *_: True)
        out = attend_latent(query, history, up, SHAPE, 0.3, mask)
    nope, values = up.expand(history.dense(0))
    keys = torch.cat([nope, history.dense(1).expand(-1, 4, -1, -1)], -1)
    torch.testing.assert_close(out.double(), reference(query, keys, values, 0.3, mask), atol=2e-5, rtol=2e-4)


def test_few_queries_are_absorbed_and_many_expanded() -> None:
    deepseek_v3 = LatentShape(rank=512, nope=128, rope=64, value=128)
    assert deepseek_v3.absorbs(1) and deepseek_v3.absorbs(170) and not deepseek_v3.absorbs(171)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // 4 for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("queries", [1, 100])
@pytest.mark.parametrize("is_latent", [False, True])
def test_nothing_grows_with_the_context(
    queries: int, is_latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "TILE", 1 << 15)
    monkeypatch.setattr(latent, "TILE", 1 << 15)
    largest = []
    for past in (1024, 4096):
        history = history_of(4, past, queries, 1, (SHAPE.rank, SHAPE.rope), latent=is_latent)
        query = torch.randn(2, 4, queries, SHAPE.nope + SHAPE.rope if is_latent else SHAPE.rank)
        with _Largest() as seen:
            if is_latent:
                attend_latent(query, history, Up(True), SHAPE, 0.3, Mask())
            else:
                attend(query, history, 0.3, Mask())
        largest.append(seen.elements)
    records = max(part.nbytes // 4 for s in history.segments for part in (*s.keys, *s.values))
    assert largest[1] <= max(largest[0], records)
    assert largest[1] < 4096 * SHAPE.rank
