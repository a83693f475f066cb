"""Prompts in pieces: the same tokens, chosen with a memory, set on the model, saved, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from ciuic_hf import CiuicConfig
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.devices import check_max_memory

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
CHUNK = 24


def load_with(path: Path, **options: Any) -> Any:
    config = CiuicConfig(**options)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32)


def pieces_of(model: Any, *args: Any, **options: Any) -> tuple[Tensor, list[int]]:
    """What is generated, and how many tokens each forward pass of the prompt had."""
    seen: list[int] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any], _out: Any) -> None:
        given = kwargs.get("input_ids")
        seen.append((kwargs["inputs_embeds"] if given is None else given).shape[1])

    hook = model.model.register_forward_hook(note, with_kwargs=True)
    out = model.generate(*args, **GREEDY, **options)
    hook.remove()
    return out, [n for n in seen if n > 1]


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(5, 250, (2, 100))


@pytest.mark.parametrize("family", ["llama_wide", "v3_bf16", "deepseek_v2", "deepseek_v32", "qwen2_tied"])
def test_the_same_tokens_in_pieces(family: str, checkpoint: Callable[[str], Path], ids: Tensor) -> None:
    """Left padding, embeddings, a short prompt, a static cache, beams."""
    model = load_with(checkpoint(family), bits=8, prefill_chunk=CHUNK)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    embeds = model.get_input_embeddings()(ids).detach()
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((ids,), {"attention_mask": mask}),
        ((), {"inputs_embeds": embeds, "attention_mask": mask}),
        ((ids[:1, :CHUNK],), {}),
        ((ids,), {"attention_mask": mask, "cache_implementation": "static", "disable_compile": True}),
        ((ids[:1],), {"num_beams": 3}),
    ]
    found = [pieces_of(model, *args, **options) for args, options in calls]
    model.generation_config.prefill_chunk_size = None
    for (out, pieces), (args, options) in zip(found, calls, strict=True):
        whole, one = pieces_of(model, *args, **options)
        assert torch.equal(out, whole), options
        assert max(pieces) <= CHUNK and sum(pieces) == sum(one) and len(one) == 1


def test_several_turns_and_no_cache(checkpoint: Callable[[str], Path], ids: Tensor) -> None:
    model, results = load_with(checkpoint("v3_bf16"), bits=8, prefill_chunk=CHUNK), []
    for chunk in (CHUNK, None):
        model.generation_config.prefill_chunk_size = chunk
        first = model.generate(ids[:1], return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, ids[1:]], dim=1)
        results.append(pieces_of(model, longer, past_key_values=first.past_key_values)[0])
        results.append(pieces_of(model, ids, use_cache=False)[0])
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("family", ["llama_wide", "v3_bf16", "deepseek_v32"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_compressed_cache_in_pieces(
    family: str, bits: int, checkpoint: Callable[[str], Path], ids: Tensor
) -> None:
    """Later pieces read earlier ones compressed: what is short enough for the tail is the same to the last token."""
    model = load_with(checkpoint(family), bits=8, prefill_chunk=8, cache_bits=bits)
    short = ids[:, :32]
    out, pieces = pieces_of(model, short)
    assert pieces == [8, 8, 8, 8]
    long, pieces = pieces_of(model, torch.cat([ids, ids], dim=1))
    assert pieces == [8] * 25 and torch.isfinite(long).all()
    model.generation_config.prefill_chunk_size = None
    assert torch.equal(out, model.generate(short, **GREEDY))


def test_a_memory_chooses_pieces_and_they_are_kept(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("llama_wide")
    tight = load_with(path, memory="64MiB", context=4096)
    chunk = tight.generation_config.prefill_chunk_size
    assert chunk is not None and chunk < 4096
    assert f"in pieces of {chunk} tokens" in str(tight.ciuic_report)
    assert tight.config.quantization_config.prefill_chunk == chunk
    with pytest.raises(CiuicError, match="The smallest plan needs"):
        load_with(path, memory="64MiB", context=4096, prefill_chunk="none")
    tight.save_pretrained(tmp_path / "saved")
    auto = AutoModelForCausalLM
    assert auto.from_pretrained(tmp_path / "saved").generation_config.prefill_chunk_size == chunk
    for given, expected in ((64, 64), ("none", None)):
        with pytest.warns(UserWarning, match="quantization_config"):
            again = auto.from_pretrained(
                tmp_path / "saved", quantization_config=CiuicConfig(prefill_chunk=given)
            )
        assert again.generation_config.prefill_chunk_size == expected


def test_bits_alone_and_a_generation_config_of_the_user(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("llama_wide")
    assert load_with(path, bits=4).generation_config.prefill_chunk_size is None
    own = transformers.GenerationConfig(prefill_chunk_size=77)
    config = CiuicConfig(bits=4, prefill_chunk=CHUNK)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, generation_config=own)
    assert model.generation_config.prefill_chunk_size == 77


def test_what_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(CiuicError, match="give one, or a number of tokens"):
        CiuicConfig(bits=4, prefill_chunk="auto")
    with pytest.raises(CiuicError, match="prefill_chunk must be a positive number"):
        CiuicConfig(bits=4, prefill_chunk=0)


def test_max_memory_below_the_memory_is_refused(checkpoint: Callable[[str], Path]) -> None:
    """Before a weight is read; else accelerate would quietly put weights on the disk."""
    config = CiuicConfig(memory="40MiB", context=64)
    options = {"quantization_config": config, "device_map": "auto"}
    with pytest.raises(CiuicError, match=r"memory=40.0 MiB .* leaves 20.0 MiB on device cpu"):
        AutoModelForCausalLM.from_pretrained(
            checkpoint("llama_wide"), max_memory={"cpu": 20 << 20}, **options
        )
    AutoModelForCausalLM.from_pretrained(checkpoint("llama_wide"), max_memory={"cpu": 40 << 20}, **options)


@pytest.mark.parametrize(
    ("there", "fits"),
    [
        ({0: 20, "cpu": 900}, False),
        ({0: 22, "cpu": 0}, True),
        ({0: 20, 1: 20}, True),
        ({0: 8, 1: 9, "cpu": 90}, False),
    ],
)
def test_accelerators_that_have_room(there: dict[int | str, int], fits: bool) -> None:
    if fits:
        return check_max_memory(there, memory=25, weights=18)
    with pytest.raises(CiuicError, match="before transformers looks at max_memory"):
        check_max_memory(there, memory=25, weights=18)
