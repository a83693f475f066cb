"""``CiuicCache`` inside transformers: every way of generating, every family, and what bad input gets."""

from __future__ import annotations

import copy
import inspect
import logging as stdlib_logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.utils import logging

from ciuic_hf import CiuicCache, CiuicConfig, CiuicError, use_ciuic_attention
from ciuic_hf.hf.cache import CiuicLayer
from ciuic_hf.hf.cache_name import cache_name
from ciuic_hf.planning.cache_formats import cache_nbytes, cache_nbytes_per_token

FAMILIES = ["v3_bf16", "deepseek_v2", "deepseek_v32", "qwen2_tied", "qwen3_moe", "gpt_neox"]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
PROMPT = 150
# Attention goes by the family and the store by the bits: every family at 4, and one of each store at the others.
FAMILIES_AND_BITS = [
    pytest.param(
        family, bits, marks=() if bits == 4 or family in ("v3_bf16", "qwen2_tied") else pytest.mark.slow
    )
    for bits in (8, 4, 3, 2)
    for family in FAMILIES
]


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.randint(2, 290, (2, PROMPT), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def model_of(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> Callable[..., Any]:
    return lambda family, **options: load(checkpoint(family), dtype=torch.float32, **options)


def logits_after(
    model: Any, cache: Any, ids: Tensor, step: int = 1, at_once: int = PROMPT // 2, **options: Any
) -> Tensor:
    """Of all tokens after the first, which go in at once, ``step`` at a time. 64 tokens are packed at the 96th."""
    with torch.no_grad():
        model(ids[:, :at_once], past_key_values=cache)
        parts = [
            model(ids[:, i : i + step], past_key_values=cache, **options).logits
            for i in range(at_once, ids.shape[1], step)
        ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("family", "bits"), FAMILIES_AND_BITS)
def test_tiles_and_the_decompressed_whole_give_the_same(
    family: str, bits: int, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = model_of(family)
    whole = logits_after(model, CiuicCache(model.config, bits), prompt, 5)
    exact = logits_after(model, DynamicCache(config=model.config), prompt, 5)
    tiles = logits_after(use_ciuic_attention(model), CiuicCache(model.config, bits), prompt, 5)
    torch.testing.assert_close(tiles, whole, atol=2e-4, rtol=2e-4)
    assert not torch.equal(whole, exact)
    assert (whole - exact).norm() < {8: 0.01, 4: 0.1, 3: 0.3, 2: 0.5}[bits] * exact.norm()


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_other_caches_compute_as_before(family: str, model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = model_of(family)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    caches = ("dynamic", "static")
    options = GREEDY | {"max_new_tokens": 6, "attention_mask": mask, "disable_compile": True}
    before = [model.generate(prompt, cache_implementation=cache, **options) for cache in caches]
    plain = model(prompt, attention_mask=mask).logits
    use_ciuic_attention(model)
    for cache, expected in zip(caches, before, strict=True):
        assert torch.equal(model.generate(prompt, cache_implementation=cache, **options), expected)
    assert torch.equal(model(prompt, attention_mask=mask).logits, plain)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "look-up": {"prompt_lookup_num_tokens": 4},
    "chunks": {"prefill_chunk_size": 40},
}


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
@pytest.mark.parametrize("way", WAYS)
def test_eight_bits_generate_what_full_precision_does(
    family: str, way: str, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    """Margins between tokens of these models are wider than the error of 8 bits."""
    model = model_of(family)
    ids = prompt[:1] if way == "look-up" else prompt
    options = GREEDY | WAYS[way] | {"max_new_tokens": 12}
    expected = model.generate(ids, **options)
    cache = CiuicCache(model.config, bits=8)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert any(layer.store.segments for layer in cache.layers)


@pytest.mark.parametrize(
    ("family", "step"),
    [
        ("v3_bf16", 1),
        ("qwen2_tied", 7),
        pytest.param("v3_bf16", 7, marks=pytest.mark.slow),
        pytest.param("qwen2_tied", 1, marks=pytest.mark.slow),
    ],
)
def test_left_padding_changes_nothing(
    family: str, step: int, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    """8 bits, as padding shares key groups with tokens."""
    model = use_ciuic_attention(model_of(family))
    row = prompt[:1]
    alone = logits_after(model, CiuicCache(model.config, 8), row, step)
    cache = CiuicCache(model.config, 8)
    padded = torch.cat([torch.full((1, 20), 1), row], 1)
    mask = (torch.arange(padded.shape[1]) >= 20).long()[None]
    positions = mask.cumsum(1).sub(1).clamp(min=0)
    half, outputs = 20 + PROMPT // 2, []
    with torch.no_grad():
        model(
            padded[:, :half],
            attention_mask=mask[:, :half],
            position_ids=positions[:, :half],
            past_key_values=cache,
        )
        for i in range(half, padded.shape[1], step):
            stop = min(i + step, padded.shape[1])
            out = model(
                padded[:, i:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, i:stop],
                past_key_values=cache,
            )
            outputs.append(out.logits)
    torch.testing.assert_close(torch.cat(outputs, 1), alone, atol=0.02, rtol=0.02)


def test_turns_of_a_conversation_go_on_where_the_last_ended(
    model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = model_of("v3_bf16")
    cache, ids = CiuicCache(model.config, 8), prompt[:1, :100]
    exact = ids
    for turn in range(3):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=10, **GREEDY)
        exact = model.generate(exact, max_new_tokens=10, **GREEDY)
        assert torch.equal(ids, exact)
        assert cache.get_seq_length() == ids.shape[1] - 1
        more = prompt[1:, 20 * turn : 20 * turn + 20]
        ids, exact = torch.cat([ids, more], 1), torch.cat([exact, more], 1)


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_cropping_and_choosing_sequences(family: str, model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of(family))
    cache = CiuicCache(model.config, 8)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        before = model(prompt[:, :1], past_key_values=copy.deepcopy(cache)).logits
        model(prompt[:, :9], past_key_values=cache)
        cache.crop(-9)
        assert cache.get_seq_length() == PROMPT
        after = model(prompt[:, :1], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(after, before, atol=0.02, rtol=0.02)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        swapped = model(prompt[:, :1].flip(0), past_key_values=cache).logits.flip(0)
        torch.testing.assert_close(swapped, after)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.nbytes == 0
        model(prompt[:1], past_key_values=cache)
    assert cache.get_seq_length() == PROMPT


def test_layers_go_to_the_cpu_and_back(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of("v3_bf16"))
    cache = CiuicCache(model.config, 4)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        expected = model(prompt[:, :1], past_key_values=copy.deepcopy(cache)).logits
        for layer in cache.layers:
            layer.offload()
        assert torch.equal(model(prompt[:, :1], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied", "qwen3_moe"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_sizes_are_what_the_planner_is_told(
    family: str, bits: int, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = use_ciuic_attention(model_of(family))
    config = model.config.to_dict()
    cache = CiuicCache(model.config, bits)
    with torch.no_grad():
        for ids in (prompt, prompt[:, :1], prompt):
            model(ids, past_key_values=cache)
            assert cache.nbytes == cache_nbytes(config, bits, cache.get_seq_length(), 2, 4)
    packed = sum(
        part.nbytes for layer in cache.layers for s in layer.store.segments for part in (*s.keys, *s.values)
    )
    assert packed == 2 * 512 * cache_nbytes_per_token(config, bits)


def test_a_compressed_model_with_cache_bits_uses_them_by_itself(
    checkpoint: Callable[[str], Path], tmp_path: Path, prompt: Tensor
) -> None:
    config = CiuicConfig(bits=4.25, policy="uniform", cache_bits=4)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint("v3_bf16"), quantization_config=config, dtype=torch.float32)
    options = GREEDY | {"max_new_tokens": 4, "return_dict_in_generate": True}
    out = model.generate(prompt, **options)
    assert isinstance(out.past_key_values, CiuicCache) and out.past_key_values.bits == 4
    given = model.generate(prompt, past_key_values=CiuicCache(model.config, 4), **options)
    assert torch.equal(out.sequences, given.sequences)
    static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
    assert isinstance(static.past_key_values, CiuicCache) and static.past_key_values.is_compileable
    assert torch.equal(static.sequences, out.sequences)
    assert not isinstance(model.generate(prompt, use_cache=False, **options).past_key_values, CiuicCache)
    model.save_pretrained(tmp_path / "saved")
    again = auto.from_pretrained(tmp_path / "saved", dtype=torch.float32).generate(prompt, **options)
    assert isinstance(again.past_key_values, CiuicCache)
    assert torch.equal(again.sequences, out.sequences)
    with pytest.warns(UserWarning, match="quantization_config"):  # transformers', of the other settings
        other = auto.from_pretrained(tmp_path / "saved", quantization_config=CiuicConfig(cache_bits=2))
    assert other.generate(prompt, **options).past_key_values.bits == 2


def test_compressed_weights_are_absorbed(
    model_of: Callable[..., Any], saved: Callable[[str], Path], load: Any, prompt: Tensor
) -> None:
    """``kv_b_proj`` decoded by bands of heads gives what its own forward gives."""
    model = load(saved("v3_wide_fp8"), dtype=torch.float32)
    whole = logits_after(model, CiuicCache(model.config, 4), prompt[:, :102], at_once=90)
    use_ciuic_attention(model)
    absorbed = logits_after(model, CiuicCache(model.config, 4), prompt[:, :102], at_once=90)
    torch.testing.assert_close(absorbed, whole, atol=2e-4, rtol=2e-4)


def test_a_copy_of_a_model_attends_with_its_own_weights(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of("v3_bf16"))
    expected = logits_after(model, CiuicCache(model.config, 4), prompt[:, :102], at_once=90)
    other = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "kv_b_proj"):
            module.kv_b_proj.weight.data.zero_()
    found = logits_after(other, CiuicCache(other.config, 4), prompt[:, :102], at_once=90)
    assert torch.equal(found, expected)


def test_sliding_windows_keep_their_own_storage(prompt: Tensor) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.Gemma3ForCausalLM(config).eval()
    exact = logits_after(model, DynamicCache(config=config), prompt, 5)
    use_ciuic_attention(model)
    cache = CiuicCache(config, 8)
    assert [isinstance(layer, CiuicLayer) for layer in cache.layers] == [False, True]
    torch.testing.assert_close(logits_after(model, cache, prompt, 5), exact, atol=0.02, rtol=0.02)


def test_what_reads_it_decompressed_says_so_once(
    model_of: Callable[..., Any], prompt: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    stdlib_logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model = model_of("qwen2_tied", attn_implementation="eager")
    model.generate(prompt, past_key_values=CiuicCache(model.config, 4), max_new_tokens=4, **GREEDY)
    logging.disable_propagation()
    assert model.config._attn_implementation == "eager"
    assert len([r for r in caplog.records if "use_ciuic_attention" in r.message]) == 1


def test_gradients_are_refused(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of("qwen2_tied"))
    cache = CiuicCache(model.config, 4)
    model(prompt, past_key_values=cache)
    loss = model(prompt, past_key_values=cache).logits.sum()
    with pytest.raises(CiuicError, match="carries no gradients"):
        loss.backward()


def test_what_is_no_config() -> None:
    with pytest.raises(CiuicError, match=r"got str; write CiuicCache\(model.config\)"):
        CiuicCache("deepseek-ai/DeepSeek-V2-Lite")


@pytest.mark.parametrize("bits", [5, 16, 0, 4.0, "4", True, None])
def test_bits_that_no_cache_has(bits: Any, model_of: Callable[..., Any]) -> None:
    with pytest.raises(CiuicError, match="8, 4, 3 or 2 bits"):
        CiuicCache(model_of("qwen2_tied").config, bits)
    if bits is not None:
        with pytest.raises(CiuicError, match="8, 4, 3 or 2 bits"):
            CiuicConfig(cache_bits=bits)


def test_a_cache_of_another_model(model_of: Callable[..., Any], prompt: Tensor) -> None:
    qwen, deepseek = model_of("qwen2_tied"), model_of("v3_bf16")
    cache = CiuicCache(qwen.config)
    with torch.no_grad():
        qwen(prompt, past_key_values=cache)
        with pytest.raises(
            CiuicError, match=r"holds 2 sequences, 2 heads of 40, the model gives 2 sequences, 1 heads"
        ):
            deepseek(prompt, past_key_values=cache)
        with pytest.raises(CiuicError, match=r"holds 2 sequences.*gives 1 sequences"):
            qwen(prompt[:1], past_key_values=cache)
        with pytest.raises(CiuicError, match="made for a model of 2 layers"):
            deepseek(prompt, past_key_values=CiuicCache(qwen.config))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2}),
        ("T5", {}),
        ("FalconH1", {"num_hidden_layers": 2}),
    ],
)
def test_models_without_a_cache_that_grows(name: str, options: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(**options)
    with pytest.raises(CiuicError, match="use its own cache"):
        CiuicCache(config)


def test_the_keyword_of_the_cache_is_the_one_that_models_take() -> None:
    """transformers 5.24 renamed it, and passes what comes under another name on beside a DynamicCache of its own."""
    assert cache_name() in inspect.signature(LlamaForCausalLM.forward).parameters
