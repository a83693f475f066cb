"""The memory model and the sizes that people write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.attending import Piece, attention_nbytes
from ciuic_hf.planning.cache_formats import CACHE_BITS, cache_formats, cache_nbytes, cache_nbytes_per_token
from ciuic_hf.planning.memory import Run, Sizes, footprint, largest_fitting, parse_size
from ciuic_hf.planning.tiles import LatentShape

V3: dict[str, Any] = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
}
V32: dict[str, Any] = V3 | {"index_n_heads": 64, "index_head_dim": 128}
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "intermediate_size": 14336,
}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("22GiB", 22 << 30),
        ("24GB", 24 * 10**9),
        ("1.5 gib", 3 << 29),
        ("100", 100),
        ("512MiB", 512 << 20),
        (7, 7),
    ],
)
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0GiB", "3 parsecs", "IB", 0, -5, True, 2.5, None])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(CiuicError, match='memory must be a size such as "22GiB"'):
        parse_size(text)


def test_the_cache_of_known_models() -> None:
    """V3 keeps 576 values a layer and token (arXiv 2412.19437), V3.2 128 more, Llama 8B 2 x 8 x 128."""
    assert footprint(V3, 1000).cache == 576 * 2 * 1000 * 61
    assert footprint(V32, 1000).cache == 704 * 2 * 1000 * 61
    assert footprint(LLAMA, 1000, batch=3).cache == 2048 * 2 * 3000 * 32


@given(st.sampled_from([V3, LLAMA]), st.sampled_from(CACHE_BITS), st.integers(1, 50_000), st.integers(1, 4))
def test_a_compressed_cache_takes_its_bytes(
    config: dict[str, Any], bits: int, context: int, batch: int
) -> None:
    found = footprint(config, context, batch, Run(cache_bits=bits))
    assert found.cache == cache_nbytes(config, bits, context, batch)
    plain = footprint(config, context, batch)
    assert (found.activations, found.logits) == (plain.activations, plain.logits)
    assert config is V3 or found.attention + found.workspace == plain.attention + plain.workspace


def test_indexer_keys_stay_as_they_are() -> None:
    there, without = (footprint(config, 4096, 2, Run(cache_bits=4)).cache for config in (V32, V3))
    assert there - without == 128 * 2 * 61 * 2 * 4096


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_latents_are_not_expanded_as_a_whole(device: str) -> None:
    """Sums of queries in float32 take as much on a GPU; a CPU forms no scores of the whole. Steps expand nothing."""
    plain, tiled = Run(device=device), Run(device=device, cache_bits=4)
    sizes = Sizes(V3)
    once, twice = (attention_nbytes(sizes, tiled, Piece(n, n, 1)) for n in (100_000, 200_000))
    assert twice < 2.01 * once
    expanded = attention_nbytes(sizes, plain, Piece(100_000, 100_000, 1))
    assert once <= expanded / (1 if device == "cuda" else 100)
    read = [sizes.step_nbytes(run, 100_000) for run in (plain, tiled)]
    assert read[1] == pytest.approx(cache_nbytes_per_token(V3, 4) * 100_000) and read[1] < read[0] / 100


@given(
    st.integers(1, 30_000), st.integers(1, 300), st.sampled_from(CACHE_BITS), st.sampled_from(["cpu", "cuda"])
)
def test_more_tokens_take_more_on_a_compressed_cache(
    context: int, batch: int, bits: int, device: str
) -> None:
    """Also where absorbing ends; packing a group makes the cache smaller by what it took in full precision."""
    run = Run(cache_bits=bits, device=device)
    here = footprint(V3, context, batch, run)
    # Of the tokens that are packed together, in full precision.
    group = cache_formats(bits, latent=True).group * cache_nbytes(V3, bits, 1, batch)
    tile = footprint(V3, 1, batch, run).attention + (8 << 20)  # of whole groups, so that it is not quite even
    assert here.total <= footprint(V3, context + 1, batch, run).total + 1.02 * (group + tile)
    assert here.total <= footprint(V3, context, batch + 1, run).total + 1.02 * (group + tile)


@given(st.integers(1, 600), st.integers(1, 100), st.integers(1, 100), st.integers(0, 64), st.integers(1, 100))
def test_the_most_that_is_absorbed(rank: int, nope: int, value: int, rope: int, queries: int) -> None:
    shape = LatentShape(rank, nope, rope, value)
    most = shape.most_absorbed(queries)
    assert most == max((n for n in range(1, queries + 1) if shape.absorbs(n)), default=0)


@pytest.mark.parametrize(
    ("config", "run", "scores"),
    [
        (LLAMA, Run(), 0),
        (LLAMA, Run(device="cpu"), 0),
        (V3, Run(), 0),
        (V3, Run(device="cpu"), 128 * 9),  # its values are narrower than its keys
        (LLAMA, Run(device="cpu", path="eager"), 32 * 10),
        (V3, Run(path="eager"), 128 * 8),
        (V32, Run(), (64 + 128) * 4),  # the indexer's
    ],
)
def test_scores_are_counted_where_they_are_formed(config: dict[str, Any], run: Run, scores: int) -> None:
    """Of what grows with the square of the context nothing else is as large: masks are the rest."""
    step, grown = 100_000, footprint(config, 200_000, run=run).total
    squares = (grown - 2 * footprint(config, step, run=run).total) / (2 * step**2)
    assert scores - 0.01 <= squares / 1.02 <= scores + 6


def test_parts_are_what_each_adds_to_the_others() -> None:
    """The peak is the largest of what is alive at one moment, not the sum."""
    found = footprint(LLAMA, 4096)
    assert found.activations == 4096 * (4 * 4096 + 3 * 14336) * 2
    assert found.attention == 0
    assert footprint(V3, 4096).attention == 0
    assert footprint(V3, 4096, run=Run(device="cpu")).attention > 0


@given(st.integers(1, 200_000), st.integers(1, 64), st.sampled_from([V3, LLAMA]))
def test_more_tokens_take_more(context: int, batch: int, config: dict[str, Any]) -> None:
    here = footprint(config, context, batch)
    assert here.total < footprint(config, context + 1, batch).total
    assert here.total < footprint(config, context, batch + 1).total
    assert here.total == sum(vars(here).values())


@given(st.integers(0, 1 << 40), st.integers(1, 16))
def test_the_longest_context_fits_and_one_more_does_not(room: int, batch: int) -> None:
    longest = largest_fitting(V3, room, batch=batch)
    assert longest == 0 or footprint(V3, longest, batch).total <= room
    assert footprint(V3, longest + 1, batch).total > room
    assert largest_fitting(V3, room, batch=batch, limit=5000) == min(longest, 5000)


@pytest.mark.parametrize("bad", [0, -1, 2.5, True, "many"])
def test_bad_contexts(bad: Any) -> None:
    with pytest.raises(CiuicError, match="context must be a positive integer"):
        footprint(V3, bad)


def test_a_config_without_layers_is_refused() -> None:
    with pytest.raises(CiuicError, match="its config lacks hidden_size"):
        footprint({"model_type": "unet"}, 10)
