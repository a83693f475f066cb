"""The size of the pieces of a prompt: what it costs, and which is chosen."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.memory import Run, footprint
from ciuic_hf.planning.prefill_chunk import (
    SHARE,
    SMALLEST,
    candidates,
    check_prefill_chunk,
    fastest_run,
    leanest_run,
)

LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "intermediate_size": 14336,
}
V2_LITE: dict[str, Any] = {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 6,
}
_RUNS = [Run(device=device, cache_bits=bits) for device in ("cpu", "cuda") for bits in (None, 4)]
_MODELS, _CONTEXTS = st.sampled_from([LLAMA, V2_LITE]), st.integers(1, 200_000)


@given(_MODELS, st.sampled_from([*_RUNS, Run(path="eager")]), _CONTEXTS, st.integers(1, 4))
def test_a_piece_that_holds_the_prompt_changes_nothing(
    config: dict[str, Any], run: Run, context: int, batch: int
) -> None:
    whole = footprint(config, context, batch, run)
    assert footprint(config, context, batch, replace(run, prefill_chunk=context)) == whole
    assert footprint(config, context, batch, replace(run, prefill_chunk=2 * context)) == whole


@given(_MODELS, st.sampled_from(_RUNS), _CONTEXTS, st.integers(1, 4), st.integers(1 << 30, 1 << 38))
def test_the_choice_costs_little_and_none_larger_would(
    config: dict[str, Any], run: Run, context: int, batch: int, memory: int
) -> None:
    least = footprint(config, context, batch, leanest_run(config, context, batch, run)).total
    chosen = fastest_run(config, memory, context, batch, run)
    assert footprint(config, context, batch, chosen).total <= least + SHARE * memory
    for size in candidates(context):
        taken = footprint(config, context, batch, replace(run, prefill_chunk=size)).total
        assert taken >= least
        assert size <= chosen.prefill_chunk or taken > least + SHARE * memory  # type: ignore[operator]


@given(st.integers(1, 1 << 20))
def test_candidates_are_powers_of_two_up_to_the_context(context: int) -> None:
    found = candidates(context)
    assert found[-1] == SMALLEST and all(a == 2 * b for a, b in pairwise(found))
    assert found[0] >= context and (len(found) == 1 or found[1] < context)


@pytest.mark.parametrize("run", _RUNS, ids=str)
def test_long_prompts_need_no_longer_activations(run: Run) -> None:
    """Twice the context costs cache, mask and history, not activations."""
    pieces = replace(run, prefill_chunk=2048)
    short, long = (footprint(LLAMA, n, run=pieces) for n in (65_536, 131_072))
    at_once = footprint(LLAMA, 131_072, run=run)
    masks = 0 if run.cache_bits else 2048 * 65_536
    assert long.activations - short.activations == masks
    assert long.total - long.cache < (at_once.total - at_once.cache) / 4


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "", "all", "512"])
def test_what_is_no_size_of_pieces(value: Any) -> None:
    with pytest.raises(CiuicError, match="prefill_chunk must be a positive number of tokens"):
        check_prefill_chunk(value)
