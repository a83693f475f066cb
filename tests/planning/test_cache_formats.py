"""Sizes of a compressed cache: the ratios that are promised, for real models."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from ciuic_hf import CiuicError
from ciuic_hf.planning.cache_formats import cache_formats, cache_nbytes, cache_nbytes_per_token

LLAMA: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
SMOLLM2: dict[str, Any] = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
DEEPSEEK_V3: dict[str, Any] = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
PLAIN = {"llama": 2 * 32 * 8 * 256, "smollm2": 2 * 30 * 3 * 128, "deepseek_v3": 2 * 61 * 576}
CONFIGS = {"llama": LLAMA, "smollm2": SMOLLM2, "deepseek_v3": DEEPSEEK_V3}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("bits", "times"), [(8, 1.9), (4, 3.5), (3, 4.4), (2, 6.0)])
def test_a_long_cache_is_as_much_smaller_as_promised(name: str, bits: int, times: float) -> None:
    assert PLAIN[name] / cache_nbytes_per_token(CONFIGS[name], bits) >= times
    assert 100_000 * PLAIN[name] / cache_nbytes(CONFIGS[name], bits, 100_000) >= 0.98 * times


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_nothing_costs_nothing_and_more_never_costs_less(name: str, bits: int) -> None:
    sizes = [cache_nbytes(CONFIGS[name], bits, 64 * n, 2) for n in range(40)]
    assert sizes[0] == 0
    group = cache_formats(bits, name == "deepseek_v3").group
    slack = 2 * group * PLAIN[name]  # a tail that was packed
    assert all(later >= earlier - slack for earlier, later in pairwise(sizes))


def test_a_config_without_sizes() -> None:
    with pytest.raises(CiuicError, match="cache of a mamba cannot be sized"):
        cache_nbytes_per_token({"model_type": "mamba"}, 4)
