"""The memory model and the sizes that people write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.memory import Run, footprint, largest_fitting, parse_size

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


def test_a_compressed_cache_takes_its_bytes() -> None:
    plain, packed = footprint(V3, 1000), footprint(V3, 1000, run=Run(cached_nbytes=0.5625))
    assert packed.cache == int(0.5625 * 576 * 61 * 1000)
    assert vars(packed) | {"cache": 0, "slack": 0} == vars(plain) | {"cache": 0, "slack": 0}


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
