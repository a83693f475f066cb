"""What a layer stores: never encoded twice, the bytes that are promised, cut and reordered exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ciuic_hf.planning.cache_formats import (
    CACHE_BITS,
    CHUNK,
    TAIL,
    CacheFormats,
    ChannelFormat,
    Format,
    TokenFormat,
    cache_formats,
)
from ciuic_hf.runtime.cache.codes import rotate
from ciuic_hf.runtime.cache.encoding import decode, decode_into, empty_record, encode, narrow_record
from ciuic_hf.runtime.cache.store import History, LayerStore
from ciuic_kernels.cpu import cache as compiled

KINDS = [(bits, latent) for bits in CACHE_BITS for latent in (False, True)]
FORMATS: list[Format] = [ChannelFormat(b, g) for b in CACHE_BITS for g in (64, 128)]
FORMATS += [TokenFormat(b, g) for b in CACHE_BITS for g in (32, 64, 128)]
SEEDS = st.integers(0, 1000)
# Relative squared error on a normal distribution, about: Lloyd-Max below 8 bits, else a uniform grid.
BOUNDS = {8: 1e-4, 4: 0.015, 3: 0.06, 2: 0.30}


def states(
    tokens: int, batch: int = 2, heads: int = 3, widths: tuple[int, int] = (24, 40)
) -> tuple[Tensor, Tensor]:
    """Keys and values with channels of very different sizes."""
    scale = torch.logspace(-2, 1, widths[0])
    keys = torch.randn(batch, heads, tokens, widths[0]) * scale + 3 * scale.flip(0)
    return keys.bfloat16(), torch.randn(batch, heads, tokens, widths[1]).bfloat16()


def filled(formats: CacheFormats, pieces: list[int], keys: Tensor, values: Tensor) -> LayerStore:
    store, start = LayerStore(formats), 0
    for piece in pieces:
        store.append(keys[:, :, start : start + piece], values[:, :, start : start + piece])
        start += piece
    return store


def stored(store: LayerStore) -> Iterator[Tensor]:
    """Every byte that counts, in order; no segment is sealed."""
    for segment in store.segments:
        for record, fmt in ((segment.keys, store.formats.keys), (segment.values, store.formats.values)):
            yield from narrow_record(record, segment.capacity, 0, segment.tokens, fmt)
    assert store.tail is not None
    yield from store.tail


def same(a: LayerStore, b: LayerStore) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(stored(a), stored(b), strict=True))


@pytest.mark.parametrize(("bits", "latent"), KINDS)
def test_two_hundred_turns_store_what_one_does(bits: int, latent: bool) -> None:
    pieces = [int(n) for n in torch.randint(1, 12, (200,))]
    keys, values = states(sum(pieces))
    formats = cache_formats(bits, latent)
    store = filled(formats, pieces, keys, values)
    assert store.packed > CHUNK
    assert same(store, filled(formats, [sum(pieces)], keys, values))


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    pieces=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 1000),
)
def test_any_pieces_store_what_one_piece_does(
    kind: tuple[int, bool], pieces: list[int], widths: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    keys, values = states(sum(pieces), widths=widths)
    formats = cache_formats(*kind)
    store = filled(formats, pieces, keys, values)
    assert same(store, filled(formats, [sum(pieces)], keys, values))
    assert len(store) == sum(pieces)
    assert store.packed % formats.group == 0
    assert store.tail is not None
    assert min(TAIL, sum(pieces)) <= store.tail[0].shape[2] < TAIL + formats.group


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_record_takes_what_its_format_says_and_is_as_close_as_its_bits_allow(fmt: Format) -> None:
    for width in (64, 128, 100, 20, 7):
        x = torch.randn(2, 2, 128, width)
        record = encode(x, fmt)
        room = empty_record(x, 128, fmt)
        assert [(p.shape, p.dtype) for p in record] == [(p.shape, p.dtype) for p in room]
        assert sum(part.nbytes for part in record) == 2 * 2 * fmt.nbytes(128, width)
        decoded = decode(record, width, fmt, torch.float32)
        decoded = rotate(decoded) if fmt.rotates else decoded
        assert decoded.shape == x.shape
        assert (decoded - x).square().mean() < BOUNDS[fmt.bits] * x.square().mean()


@settings(max_examples=40)
@given(
    fmt=st.sampled_from([*FORMATS, ChannelFormat(4, 16), ChannelFormat(3, 16)]),
    width=st.integers(1, 140),
    groups=st.integers(1, 4),
    skipped=st.integers(0, 2),
    seed=SEEDS,
)
def test_compiled_code_gives_what_torch_does(
    fmt: Format, width: int, groups: int, skipped: int, seed: int
) -> None:
    """Bit for bit, NaN of what could not be stored too, from a part of a record into a part of a tensor."""
    if not compiled.usable(torch.device("cpu"), torch.float32):
        pytest.skip("no C compiler")
    torch.manual_seed(seed)
    group = fmt.group if isinstance(fmt, ChannelFormat) else 8
    x = torch.randn(2, 3, (groups + skipped) * group, width) * torch.logspace(-3, 2, width)
    x[1, 2, -1, width // 2] = float("nan")
    part = narrow_record(encode(x, fmt), x.shape[2], skipped * group, x.shape[2], fmt)
    room = torch.full((2, 3, width, groups * group + 5), float("inf"))
    room = room.mT if isinstance(fmt, ChannelFormat) else room.mT.contiguous()
    out = room[:, :, 2:-3]
    decode_into(part, fmt, out)
    torch.testing.assert_close(out, decode(part, width, fmt, torch.float32), rtol=0, atol=0, equal_nan=True)
    assert bool(room[:, :, :2].isinf().all()) and bool(room[:, :, -3:].isinf().all())


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(1, 900),
    cut=st.integers(1, 650),
    reference=st.booleans(),
    seed=SEEDS,
)
def test_tiles_of_any_size_are_the_history(
    kind: tuple[int, bool], tokens: int, cut: int, reference: bool, seed: int
) -> None:
    """Over the seams of segments, where one was cut, by either way of decoding."""
    torch.manual_seed(seed)
    keys, values = states(650)
    store = filled(cache_formats(*kind), [650], keys, values)
    store.truncate(cut)
    store.append(*states(700))
    history = History(store, keys[:, :, :3], values[:, :, :3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIUIC_IMPL", "reference" if reference else "auto")
        tiles = [(t.start, t.keys.clone(), t.values.clone()) for t in history.tiles(torch.float32, tokens)]
    assert [start for start, *_ in tiles] == list(range(0, history.length, tiles[0][1].shape[2]))
    for which, fmt in enumerate((history.formats.keys, history.formats.values)):
        whole = torch.cat([tile[1 + which] for tile in tiles], dim=2)
        whole = (rotate(whole) if fmt.rotates else whole).bfloat16()
        assert torch.equal(whole[:, :, : history.past], history.dense(which)[:, :, : history.past])


@pytest.mark.parametrize("bits", CACHE_BITS)
def test_keys_keep_the_extremes_of_every_channel(bits: int) -> None:
    """A few large keys decide what attention sees: none may be clipped by more than half a step."""
    x = torch.randn(1, 1, 64, 16)
    x[:, :, 10, 3], x[:, :, 20, 5] = 500.0, -500.0
    fmt = ChannelFormat(bits, 64)
    decoded = decode(encode(x, fmt), 16, fmt, torch.float32)
    spread = x.amax(2) - x.amin(2)
    step = spread / ((1 << bits) - 1) * 1.1
    assert bool(((decoded - x).abs().amax(2) <= 0.51 * step).all())


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_cannot_be_stored_shows(fmt: Format, bad: float) -> None:
    x = torch.randn(1, 1, 128, 64)
    x[0, 0, 5, 7] = bad
    decoded = decode(encode(x, fmt), 64, fmt, torch.float32)
    channel = decoded[0, 0, :64, 7] if isinstance(fmt, ChannelFormat) else decoded[0, 0, 5]
    assert not bool(channel.isfinite().any()) or bool((~channel.isfinite()).any())


@pytest.mark.parametrize(("bits", "latent"), KINDS)
@pytest.mark.parametrize("kept", [0, 1, 70, 128, 511, 512, 600, 660, 699, 700])
def test_cutting_keeps_every_token_that_stays_and_goes_on(bits: int, latent: bool, kept: int) -> None:
    keys, values = states(700)
    store = filled(cache_formats(bits, latent), [700], keys, values)
    packed = min(kept, store.packed)
    before = [History(store, keys[:, :, :1], values[:, :, :1]).dense(i)[:, :, :packed] for i in (0, 1)]
    store.truncate(kept)
    assert len(store) == kept
    more = states(300)
    store.append(*more)
    assert len(store) == kept + 300
    after = History(store, keys[:, :, :1], values[:, :, :1])
    for i in (0, 1):
        dense = after.dense(i)
        assert torch.equal(dense[:, :, :packed], before[i])
        assert torch.equal(dense[:, :, -1 - TAIL : -1], more[i][:, :, -TAIL:])
        error = (dense[:, :, kept:-1] - more[i]).float().square().mean() / more[i].float().square().mean()
        assert error < BOUNDS[2]


def test_a_history_does_not_change_when_tokens_are_added() -> None:
    keys, values = states(900)
    store = filled(cache_formats(4, False), [500], keys, values)
    history = History(store, keys[:, :, 500:501], values[:, :, 500:501])
    before = history.dense(0).clone()
    store.append(keys[:, :, 500:], values[:, :, 500:])
    assert torch.equal(history.dense(0), before)
    assert torch.equal(before[:, :, 500:], keys[:, :, 500:501])


def test_choosing_sequences_chooses_their_bytes() -> None:
    keys, values = states(700, batch=3)
    formats = cache_formats(3, False)
    store = filled(formats, [700], keys, values)
    order = torch.tensor([2, 0, 0, 1])
    store.map(lambda x: x.index_select(0, order))
    assert same(store, filled(formats, [700], keys[order], values[order]))


def test_a_long_prompt_is_not_kept_alive_by_its_tail() -> None:
    keys, values = states(700)
    store = filled(cache_formats(4, False), [700], keys, values)
    assert store.tail is not None
    assert store.tail[0].untyped_storage().nbytes() == store.tail[0].nbytes
