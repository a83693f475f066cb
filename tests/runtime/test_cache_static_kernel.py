"""The attention kernel over a static store: what the tiles give, by counters that nothing reads."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from ciuic_hf.planning.cache_formats import CACHE_BITS, CHUNK, cache_formats
from ciuic_hf.runtime.cache import fused, static_attention, static_fused
from ciuic_hf.runtime.cache.encoding import narrow_record
from ciuic_hf.runtime.cache.static_attention import StaticHistory
from ciuic_hf.runtime.cache.static_store import StaticStore
from tests.runtime.test_cache_static import counters
from tests.triton.interpreted import gpu_kernels, needs_interpreter

HEADS, LATENTS = (24, 20), (40, 16)


def store_of(bits: int, latent: bool, past: int, capacity: int) -> StaticStore:
    """Of float16, what lies past its counter poisoned."""
    widths, heads = (LATENTS, 1) if latent else (HEADS, 2)
    both = [torch.randn(2, heads, past, width).half() for width in widths]
    store = StaticStore(bits, latent, capacity, *both)
    store.append(store.recent(*both))
    formats, packed = cache_formats(bits, latent), int(store.packed)
    for record, fmt in zip(store.records, (formats.keys, formats.values), strict=True):
        for page in range(record[0].shape[0]):
            one, used = tuple(part[page] for part in record), min(max(packed - CHUNK * page, 0), CHUNK)
            for part in narrow_record(one, CHUNK, used, CHUNK, fmt):
                part.fill_(255 if part.dtype == torch.uint8 else float("nan"))
    return store


def call(store: StaticStore, latent: bool, queries: int, padded: bool) -> tuple[Any, ...]:
    """Arguments of the operator: a step of new tokens, the first sequence without its first 30 ones if padded."""
    fresh = [torch.randn(*tail.shape[:2], queries, tail.shape[3]).half() for tail in store.tails]
    history, past = StaticHistory.of(store, *fresh), int(store.length)
    mask = None
    if padded:
        own = past + torch.arange(queries)[:, None]
        mask = (torch.arange(store.capacity) <= own).expand(2, 1, -1, -1).clone()
        mask[0, ..., :30] = False
    query = torch.randn(2, 4, queries, store.tails[0].shape[3]).half()
    rope = torch.randn(2, 4, queries, store.tails[1].shape[3]).half() if latent else None
    return (query, rope, *history._arguments(), mask, 0.2)


@needs_interpreter
@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize(
    ("bits", "past", "queries", "padded"),
    [
        (4, 230, 1, False),
        (8, 700, 3, True),
        (4, 20, 1, True),
        pytest.param(3, 230, 1, True, marks=pytest.mark.slow),
        pytest.param(2, 700, 2, False, marks=pytest.mark.slow),
    ],
)
def test_kernel_and_tiles_give_the_same(
    latent: bool, bits: int, past: int, queries: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles in float32; the kernel is off by the rounding of float16."""
    store = store_of(bits, latent, past, 1100)
    arguments = call(store, latent, queries, padded)
    expected = torch.ops.ciuic_hf.attend_static(*arguments)
    calls, packed = [], fused._packed
    monkeypatch.setattr(fused, "_packed", lambda *args: calls.append(1) or packed(*args))
    with gpu_kernels(), counters("device"):
        found = torch.ops.ciuic_hf.attend_static(*arguments)
    assert calls == [1] and found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)


@needs_interpreter
def test_a_replay_finds_what_was_packed_since() -> None:
    """The same tensors, as a CUDA graph has them, after more tokens: addresses stay, counters tell."""
    store = store_of(4, False, 230, 1100)
    query, _, keys, values, addresses, *_ = call(store, False, 1, False)
    history = StaticHistory.of(store, *(tail[:, :, :1] for tail in store.tails))
    before = static_fused.page_table(history.records, addresses, store.packed)
    more = [torch.randn(*tail.shape[:2], 600, tail.shape[3]).half() for tail in store.tails]
    store.append(store.recent(*more))
    after = static_fused.page_table(history.records, store.addresses, store.packed)
    assert store.addresses is addresses
    assert before.pages.tolist() == [[192, 0, 512], [0, 512, 512]] and before.used.tolist() == [1]
    assert after.pages.tolist() == [[512, 0, 512], [256, 512, 512]] and after.used.tolist() == [2]
    arguments = (query, None, keys, values, addresses, store.packed, store.length)
    arguments += (*store.recent(*(x[:, :, :1] for x in more)), 1, 4, False, None, 0.2)
    expected = torch.ops.ciuic_hf.attend_static(*arguments)
    with gpu_kernels(), counters("device"):
        found = torch.ops.ciuic_hf.attend_static(*arguments)
    torch.testing.assert_close(found, expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("bits", CACHE_BITS)
def test_nothing_is_read_from_a_device(bits: int, latent: bool) -> None:
    """On ``meta`` a counter has no value that could be read."""
    with torch.device("meta"), gpu_kernels():
        widths, heads = (LATENTS, 1) if latent else (HEADS, 2)
        fresh = [torch.randn(2, heads, 1, width, dtype=torch.float16) for width in widths]
        history = StaticHistory.of(StaticStore(bits, latent, 1100, *fresh), *fresh)
        query, rope = (torch.randn(2, 4, 1, width, dtype=torch.float16) for width in widths)
        mask = torch.ones(2, 1, 1, 1100, dtype=torch.bool)
        assert static_fused.serves(query, history, mask, latent)
        out = static_attention._fused(query, rope if latent else None, history, mask, 0.2)
    assert out.shape == (2, 4, 1, widths[0 if latent else 1])


def lies_at(store: StaticStore) -> Tensor:
    parts = [part for record in store.records for part in record]
    return torch.tensor([[part[page].data_ptr() for part in parts] for page in range(parts[0].shape[0])])


def test_addresses_are_those_of_the_pages_whatever_is_done_to_them() -> None:
    store = store_of(4, False, 700, 1100)
    first = store.addresses
    assert torch.equal(first, lies_at(store)) and first.shape[0] == 2
    store.select(torch.tensor([1, 0]))
    store.clear()
    assert store.addresses is first and torch.equal(first, lies_at(store))
    copy = deepcopy(store)
    assert torch.equal(copy.addresses, lies_at(copy)) and not torch.equal(copy.addresses, first)
    store.map_batch(lambda x, axis: x.repeat_interleave(2, dim=axis))
    assert torch.equal(store.addresses, lies_at(store)) and not torch.equal(store.addresses, first)
    store.move("cpu")
    assert torch.equal(store.addresses, lies_at(store))


@pytest.mark.parametrize(("width", "capacity"), [(33, 1100), (32, 60)])
def test_pages_that_the_kernel_cannot_read_have_the_tiles(width: int, capacity: int) -> None:
    """Pages that are no multiple of 16 bytes; no page."""
    x = torch.randn(1, 1, 1, width).half()
    history = StaticHistory.of(StaticStore(2, False, capacity, x, x), x, x)
    assert history.addresses.shape[0] == 0
    with gpu_kernels():
        assert not static_fused.serves(torch.randn(1, 2, 1, width).half(), history, None, False)
