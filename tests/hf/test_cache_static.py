"""``CiuicCache(max_cache_len=...)`` inside transformers: the results of the growing one, compiled once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

from ciuic_hf import CiuicCache, CiuicConfig, CiuicError, use_ciuic_attention
from ciuic_hf.hf.static_cache import CiuicStaticLayer
from ciuic_hf.planning.cache_formats import CACHE_BITS, cache_nbytes
from ciuic_hf.runtime.cache import static_fused
from ciuic_hf.runtime.cache.static_attention import StaticHistory

FAMILIES = ["v3_bf16", "deepseek_v2", "qwen2_tied", "qwen3_moe", "gpt_neox"]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "eos_token_id": None}
ROOM = 200
PROMPT = 150
# Attention goes by the family and the store by the bits: every family at 4, and one of each store at the others.
FAMILIES_AND_BITS = [
    pytest.param(
        family, bits, marks=() if bits == 4 or family in ("v3_bf16", "qwen2_tied") else pytest.mark.slow
    )
    for bits in CACHE_BITS
    for family in FAMILIES
]


@pytest.fixture(scope="module")
def prompt() -> Tensor:
    return torch.randint(2, 290, (2, PROMPT), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def model_of(checkpoint: Callable[[str], Path], load: Callable[..., Any]) -> Callable[..., Any]:
    return lambda family, **options: load(checkpoint(family), dtype=torch.float32, **options)


def logits_after(
    model: Any, cache: Any, ids: Tensor, step: int, forward: Any = None, at_once: int = PROMPT // 2
) -> Tensor:
    """Of all tokens after the first, which go in at once, ``step`` at a time."""
    forward = forward or model
    with torch.no_grad():
        model(ids[:, :at_once], past_key_values=cache)
        parts = [
            forward(ids[:, i : i + step], past_key_values=cache).logits
            for i in range(at_once, ids.shape[1], step)
        ]
    return torch.cat(parts, 1)


def logits_of_steps(model: Any, cache: Any, ids: Tensor, forward: Any = None) -> Tensor:
    """Of twelve steps of a token; 64 tokens are packed during the sixth."""
    return logits_after(model, cache, ids[:, :102], 1, forward, at_once=90)


@pytest.mark.parametrize(("family", "bits"), FAMILIES_AND_BITS)
def test_logits_are_those_of_the_growing_cache(
    family: str, bits: int, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = model_of(family)
    whole = logits_after(model, CiuicCache(model.config, bits, max_cache_len=ROOM), prompt, 5)
    use_ciuic_attention(model)
    expected = logits_after(model, CiuicCache(model.config, bits), prompt, 5)
    cache = CiuicCache(model.config, bits, max_cache_len=ROOM)
    tiles = logits_after(model, cache, prompt, 5)
    for found in (whole, tiles):  # the last bit of a state may turn a code, and a code a router's choice
        assert (found - expected).norm() < 1e-3 * expected.norm()
    assert int(cache.get_seq_length()) == PROMPT and cache.get_max_length() == ROOM


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_a_step_is_compiled_once_for_all_lengths_and_caches(
    family: str, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = use_ciuic_attention(model_of(family))
    expected = logits_of_steps(model, CiuicCache(model.config, 4), prompt)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    caches = [CiuicCache(model.config, 4, max_cache_len=ROOM) for _ in range(2)]
    assert all(cache.is_compileable for cache in caches)
    for cache in (*caches, caches[0]):
        cache.reset()
        found = logits_of_steps(model, cache, prompt, compiled)
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_compressed_weights_are_absorbed_by_a_compiler(
    saved: Callable[[str], Path], load: Any, prompt: Tensor
) -> None:
    model = use_ciuic_attention(load(saved("v3_wide_fp8"), dtype=torch.float32))
    expected = logits_of_steps(model, CiuicCache(model.config, 4), prompt)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = CiuicCache(model.config, 4, max_cache_len=ROOM)
    torch.testing.assert_close(
        logits_of_steps(model, cache, prompt, compiled), expected, atol=2e-4, rtol=2e-4
    )
    torch.compiler.reset()


def test_other_attention_gets_the_whole_from_a_compiler(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = model_of("qwen2_tied", attn_implementation="eager")
    expected = logits_of_steps(model, CiuicCache(model.config, 4), prompt)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    cache = CiuicCache(model.config, 4, max_cache_len=ROOM)
    torch.testing.assert_close(
        logits_of_steps(model, cache, prompt, compiled), expected, atol=2e-4, rtol=2e-4
    )
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_generate_compiles_by_itself(family: str, checkpoint: Callable[[str], Path], prompt: Tensor) -> None:
    """As on a GPU, where ``cache_implementation="static"`` is all that a user says."""
    config = CiuicConfig(bits=4.25, policy="uniform", cache_bits=4)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint(family), quantization_config=config, dtype=torch.float32)
    model.hf_quantizer._on_gpu_kernels = True  # elsewhere generate compiles no compressed weights
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    options = GREEDY | {"max_new_tokens": 12, "return_dict_in_generate": True, "attention_mask": mask}
    expected = model.generate(prompt, **options).sequences
    counter = CompileCounterWithBackend("aot_eager")

    def backend(graph: Any, inputs: Any) -> Any:  # generate copies what is no function
        return counter(graph, inputs)

    compile_config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compile_config._compile_all_devices = True
    options |= {"cache_implementation": "static", "compile_config": compile_config}
    for _ in range(2):
        out = model.generate(prompt, **options)
        assert torch.equal(out.sequences, expected)
        assert isinstance(out.past_key_values, CiuicCache) and out.past_key_values.is_compileable
        assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "asked"),
    [("qwen2_tied", "at load"), pytest.param("v3_bf16", "in the call", marks=pytest.mark.slow)],
)
def test_pieces_of_a_prompt_leave_pages_that_a_kernel_finds(
    family: str,
    asked: str,
    checkpoint: Callable[[str], Path],
    prompt: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where ``generate`` compiles: pieces run as they are, then each new token reads the pages in place."""
    chunk = 64 if asked == "at load" else None
    config = CiuicConfig(bits=4.25, policy="uniform", cache_bits=4, prefill_chunk=chunk)
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(checkpoint(family), quantization_config=config, dtype=torch.float16)
    model.hf_quantizer._on_gpu_kernels = True
    seen: list[tuple[int, int]] = []
    serves = static_fused.serves

    def note(query: Tensor, history: StaticHistory, *rest: Any) -> bool:
        seen.append((query.shape[2], history.addresses.shape[0]))
        return serves(query, history, *rest)

    monkeypatch.setattr(static_fused, "serves", note)
    counter = CompileCounterWithBackend("aot_eager")
    compile_config = CompileConfig(fullgraph=True, backend=lambda *graph: counter(*graph), mode=None)
    compile_config._compile_all_devices = True
    options = GREEDY | {"max_new_tokens": 4, "prefill_chunk_size": 64}
    expected = model.generate(prompt, **options)
    options |= {"cache_implementation": "static", "compile_config": compile_config}
    assert torch.equal(model.generate(prompt, **options), expected)
    assert counter.frame_count == 1, "one token, and no piece"
    assert 1 in {queries for queries, _ in seen} and all(pages == 1 for _, pages in seen)
    torch.compiler.reset()


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 40},
}


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_generating(family: str, way: str, model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = model_of(family)
    options = GREEDY | WAYS[way] | {"max_new_tokens": 12}
    expected = model.generate(prompt, past_key_values=CiuicCache(model.config, 4), **options)
    cache = CiuicCache(model.config, 4, max_cache_len=ROOM)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **options), expected)


def test_turns_of_a_conversation_go_on_where_the_last_ended(
    model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = model_of("v3_bf16")
    static, growing = CiuicCache(model.config, 4, max_cache_len=ROOM), CiuicCache(model.config, 4)
    ids = prompt[:1, :100]
    for turn in range(3):
        options = GREEDY | {"max_new_tokens": 10}
        out = model.generate(ids, past_key_values=static, **options)
        assert torch.equal(out, model.generate(ids, past_key_values=growing, **options))
        ids = torch.cat([out, prompt[1:, 20 * turn : 20 * turn + 20]], 1)


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_cropping_and_choosing_sequences(family: str, model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of(family))
    cache, step = CiuicCache(model.config, 8, max_cache_len=ROOM), prompt[:, :1]
    with torch.no_grad():
        model(prompt, past_key_values=cache)
        before = model(step, past_key_values=cache).logits
        model(prompt[:, :9], past_key_values=cache)
        cache.crop(-10)
        torch.testing.assert_close(model(step, past_key_values=cache).logits, before, atol=0.02, rtol=0.02)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(step.flip(0), past_key_values=cache).logits.flip(0)
        torch.testing.assert_close(swapped, before, atol=0.02, rtol=0.02)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        torch.testing.assert_close(model(step, past_key_values=cache).logits, before, atol=0.02, rtol=0.02)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(prompt, past_key_values=cache).logits
    torch.testing.assert_close(again, model(prompt).logits)


@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied", "qwen3_moe"])
@pytest.mark.parametrize("bits", CACHE_BITS)
@pytest.mark.parametrize("room", [1, 31, 150, 700, 1100])
def test_sizes_are_what_the_planner_is_told(
    family: str, bits: int, room: int, model_of: Callable[..., Any], prompt: Tensor
) -> None:
    model = model_of(family)
    cache = CiuicCache(model.config, bits, max_cache_len=room)
    model(prompt[:, :room], past_key_values=cache)
    assert cache.nbytes == cache_nbytes(model.config.to_dict(), bits, room, 2, 4, static=True)


def test_more_than_fits(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of("qwen2_tied"))
    with torch.no_grad(), pytest.raises(CiuicError, match=r"150 tokens do not fit.*now 100"):
        model(prompt, past_key_values=CiuicCache(model.config, max_cache_len=100))
    cache = CiuicCache(model.config, max_cache_len=PROMPT)
    model.generate(prompt, past_key_values=cache, max_new_tokens=1, **GREEDY)
    with pytest.raises(CiuicError, match="1 tokens after 150 do not fit"):
        model(prompt[:, :1], past_key_values=cache)


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "100"])
def test_lengths_that_are_none(length: Any, model_of: Callable[..., Any]) -> None:
    with pytest.raises(CiuicError, match="max_cache_len is a number of tokens"):
        CiuicCache(model_of("qwen2_tied").config, max_cache_len=length)


def test_a_cache_of_another_batch(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = model_of("qwen2_tied")
    cache = CiuicCache(model.config, max_cache_len=ROOM)
    model(prompt, past_key_values=cache)
    with pytest.raises(CiuicError, match=r"made for 2 sequences, 2 heads of 40, the model gives 1 sequences"):
        model(prompt[:1], past_key_values=cache)


def test_sliding_windows_keep_their_own_storage(prompt: Tensor) -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = use_ciuic_attention(transformers.Gemma3ForCausalLM(config).eval())
    expected = logits_after(model, CiuicCache(config, 8), prompt, 1)
    cache = CiuicCache(config, 8, max_cache_len=ROOM)
    assert [isinstance(layer, CiuicStaticLayer) for layer in cache.layers] == [False, True]
    torch.testing.assert_close(logits_after(model, cache, prompt, 1), expected, atol=2e-4, rtol=2e-4)


def test_gradients_are_refused(model_of: Callable[..., Any], prompt: Tensor) -> None:
    model = use_ciuic_attention(model_of("qwen2_tied"))
    cache = CiuicCache(model.config, 4, max_cache_len=2 * PROMPT)
    model(prompt, past_key_values=cache)
    loss = model(prompt, past_key_values=cache).logits.sum()
    with pytest.raises(CiuicError, match="carries no gradients"):
        loss.backward()


def test_an_indexer_is_refused(model_of: Callable[..., Any]) -> None:
    with pytest.raises(CiuicError, match="no compressed cache of fixed length"):
        CiuicCache(model_of("deepseek_v32").config, max_cache_len=ROOM)
