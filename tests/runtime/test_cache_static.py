"""A static store holds the bytes of a growing one, whatever the pieces, and attention to it is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.cache_formats import CACHE_BITS, CHUNK, TAIL, cache_formats
from ciuic_hf.planning.tiles import LatentShape
from ciuic_hf.runtime.cache import static_attention, static_store
from ciuic_hf.runtime.cache.attention import Mask, attend
from ciuic_hf.runtime.cache.encoding import narrow_record
from ciuic_hf.runtime.cache.latent import attend_latent
from ciuic_hf.runtime.cache.static_attention import (
    StaticHistory,
    attend_expanded,
    attend_heads,
    attend_latents,
)
from ciuic_hf.runtime.cache.static_store import StaticStore
from ciuic_hf.runtime.cache.store import History, LayerStore

KINDS = [(bits, latent) for bits in CACHE_BITS for latent in (False, True)]
SHAPE = LatentShape(rank=40, nope=16, rope=8, value=24)


WHERE = ["host", "device"]


@contextmanager
def counters(where: str) -> Iterator[None]:
    """As on a GPU where they are on the ``device``: nothing reads them."""
    with pytest.MonkeyPatch.context() as patch:
        if where == "device":
            for module in (static_store, static_attention):
                patch.setattr(module, "can_be_read", lambda _: False)
        yield


def states(tokens: int, widths: tuple[int, int] = (20, 12), heads: int = 2, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, width) for width in widths]


def filled(
    kind: tuple[int, bool], pieces: list[int], both: list[Tensor], capacity: int
) -> tuple[StaticStore, LayerStore]:
    static = StaticStore(*kind, capacity, *both)
    dynamic, start = LayerStore(cache_formats(*kind)), 0
    for piece in pieces:
        keys, values = (x[:, :, start : start + piece] for x in both)
        static.append(static.recent(keys, values))
        dynamic.append(keys, values)
        start += piece
    return static, dynamic


def assert_same(static: StaticStore, dynamic: LayerStore) -> None:
    assert int(static.length) == len(dynamic) and int(static.packed) == dynamic.packed
    for page, segment in enumerate(dynamic.segments):
        for record, pages, fmt in (
            (segment.keys, static.records[0], static.formats.keys),
            (segment.values, static.records[1], static.formats.values),
        ):
            one = tuple(part[page] for part in pages)
            views = [narrow_record(r, CHUNK, 0, segment.tokens, fmt) for r in (record, one)]
            assert all(torch.equal(a, b) for a, b in zip(*views, strict=True))
    assert dynamic.tail is not None
    for tail, kept in zip(dynamic.tail, static.tails, strict=True):
        assert torch.equal(kept[:, :, kept.shape[2] - tail.shape[2] :], tail)


@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    pieces=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    spare=st.sampled_from([0, 1, 700]),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 1000),
    where=st.sampled_from(WHERE),
)
def test_any_pieces_store_the_bytes_of_the_dynamic_store(
    kind: tuple[int, bool], pieces: list[int], spare: int, widths: tuple[int, int], seed: int, where: str
) -> None:
    torch.manual_seed(seed)
    total = sum(pieces)
    with counters(where):
        static, dynamic = filled(kind, pieces, states(total, widths), total + spare)
    assert_same(static, dynamic)


@pytest.mark.parametrize("kind", [(2, False), (4, True)])
def test_one_token_at_a_time_stores_what_all_at_once_do_and_moves_nothing(kind: tuple[int, bool]) -> None:
    total = TAIL + 150
    both = states(total)
    with counters("device"):
        static = StaticStore(*kind, total, *both)
        addresses = [x.data_ptr() for x in static.tensors()]
        for i in range(total):
            static.append(static.recent(*(x[:, :, i : i + 1] for x in both)))
    assert addresses == [x.data_ptr() for x in static.tensors()]
    assert_same(static, filled(kind, [total], both, total)[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 700])
def test_nothing_is_read_from_a_device(kind: tuple[int, bool], tokens: int) -> None:
    """On ``meta`` a counter has no value that could be read."""
    latent = kind[1]
    with torch.device("meta"):
        fresh = states(tokens, (SHAPE.rank, SHAPE.rope) if latent else (24, 20), heads=1 if latent else 2)
        store = StaticStore(*kind, 2000, *fresh)
        history = StaticHistory.of(store, *fresh)
        store.append(history.recent)
        mask = torch.ones(2, 1, tokens, 2000, dtype=torch.bool)
        if latent:
            query, up = torch.randn(2, 4, tokens, SHAPE.nope + SHAPE.rope), Up()
            out = [f(query, history, up, SHAPE, 0.3, mask) for f in (attend_latents, attend_expanded)]
            assert [x.shape for x in out] == [(2, 4, tokens, SHAPE.value)] * 2
        else:
            out = [attend_heads(torch.randn(2, 4, tokens, 24), history, 0.3, m) for m in (mask, None)]
            assert [x.shape for x in out] == [(2, 4, tokens, 20)] * 2


class Up:
    """``Wk`` and ``Wv`` of 4 heads."""

    can_absorb = True

    def __init__(self) -> None:
        self.weight = torch.randn(4, SHAPE.nope + SHAPE.value, SHAPE.rank) * 0.2

    def absorb(self, query: Tensor) -> Tensor:
        return query @ self.weight[:, : SHAPE.nope]

    def project(self, latent: Tensor) -> Tensor:
        return latent @ self.weight[:, SHAPE.nope :].mT

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        heads = latent @ self.weight.mT
        return heads[..., : SHAPE.nope], heads[..., SHAPE.nope :]


def masks(kind: str, queries: int, length: int, capacity: int, heads: int) -> tuple[Mask, Tensor | None]:
    """For the dynamic history, and the same as wide as the capacity."""
    if kind == "causal":
        return Mask(), None
    if kind == "bias":
        bias = torch.randn(1, heads, queries, capacity)
        return Mask(causal=False, dense=bias[..., :length]), bias
    dense = torch.rand(2, 1, queries, capacity) < 0.7
    return Mask(causal=False, dense=dense[..., :length]), dense


@settings(max_examples=12)
@given(
    kind=st.sampled_from(KINDS),
    past=st.sampled_from([0, 5, 40, 200, 600]),
    queries=st.integers(1, 16),
    spare=st.sampled_from([0, 600]),
    mask=st.sampled_from(["causal", "dense", "bias"]),
    where=st.sampled_from(WHERE),
)
def test_attention_is_that_of_the_dynamic_cache(
    kind: tuple[int, bool], past: int, queries: int, spare: int, mask: str, where: str
) -> None:
    with counters(where):
        compare_attention(kind, past, queries, spare, mask)


def compare_attention(kind: tuple[int, bool], past: int, queries: int, spare: int, mask: str) -> None:
    length = past + queries
    latent = kind[1]
    both = states(length, (SHAPE.rank, SHAPE.rope) if latent else (24, 20), heads=1 if latent else 2)
    static, dynamic = filled(kind, [past], [x[:, :, :past] for x in both], length + spare)
    fresh = [x[:, :, past:] for x in both]
    history = StaticHistory.of(static, *fresh)
    expected_history = History(dynamic, *fresh)
    static.append(static.recent(*fresh))  # what a step attends to does not change by it
    dense, wide = masks(mask, queries, length, length + spare, 4)
    if latent:
        query, up = torch.randn(2, 4, queries, SHAPE.nope + SHAPE.rope), Up()
        expected = attend_latent(query, expected_history, up, SHAPE, 0.3, dense)
        found = [f(query, history, up, SHAPE, 0.3, wide) for f in (attend_latents, attend_expanded)]
    else:
        query = torch.randn(2, 4, queries, 24)
        expected = attend(query, expected_history, 0.3, dense)
        found = [attend_heads(query, history, 0.3, wide)]
    for out in found:
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=2e-4)
    for which in (0, 1):
        whole = history.dense(which)
        torch.testing.assert_close(whole[:, :, :length], expected_history.dense(which))
        assert not whole[:, :, length:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_cropping_within_the_tail_or_to_whole_groups(kind: tuple[int, bool]) -> None:
    both = states(700)
    group = cache_formats(*kind).group
    whole = 5 * group
    for kept in (700, 700 - TAIL, whole, 0):
        static, _ = filled(kind, [700], both, 800)
        static.truncate(kept)
        assert int(static.length) == kept
        more = [x[:, :, kept:] for x in both]
        static.append(static.recent(*more))
        again, _ = filled(kind, [700], both, 800)
        assert all(torch.equal(a, b) for a, b in zip(static.records[0], again.records[0], strict=True))
        assert int(static.packed) == int(again.packed)
    static, _ = filled(kind, [700], both, 800)
    packed = int(static.packed)
    static.truncate(packed)
    for kept in (packed - 1, packed - group + 1):  # after a crop the tail has lost what it would take
        with pytest.raises(CiuicError, match=r"cannot be cropped to \d+: \d+ are packed in groups of"):
            static.truncate(kept)


def test_sequences_are_chosen_in_place_and_all_is_forgotten_in_place() -> None:
    both = states(700, batch=3)
    static, _ = filled((3, False), [700], both, 700)
    addresses = [x.data_ptr() for x in static.tensors()]
    order = torch.tensor([2, 0, 0])
    static.select(order)
    chosen, _ = filled((3, False), [700], [x[order] for x in both], 700)
    assert all(torch.equal(a, b) for a, b in zip(static.tensors(), chosen.tensors(), strict=True))
    static.clear()
    assert addresses == [x.data_ptr() for x in static.tensors()]
    assert not any(x.any() for x in static.tensors())


def test_more_tokens_than_fit_are_refused_and_change_nothing() -> None:
    both = states(701)
    static, _ = filled((4, False), [700], [x[:, :, :700] for x in both], 700)
    before = [x.clone() for x in static.tensors()]
    with pytest.raises(CiuicError, match="1 tokens after 700 do not fit"):
        static.append(static.recent(*(x[:, :, 700:] for x in both)))
    assert all(torch.equal(a, b) for a, b in zip(static.tensors(), before, strict=True))
