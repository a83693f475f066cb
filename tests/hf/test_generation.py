"""Generating: pipelines and ``generate`` with every cache and way of choosing tokens."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import pipeline, set_seed

from ciuic_hf import CiuicConfig
from ciuic_hf.demo.tokenizer import save_tokenizer

FAMILIES = ["v3_fp8", "qwen2_tied"]
CACHES: list[dict[str, Any]] = [
    {},
    {"cache_implementation": "static", "disable_compile": True},
    {"use_cache": False},
]


@pytest.fixture
def with_tokenizer(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a checkpoint with a tokenizer of single bytes."""

    def add(path: Path) -> Path:
        vocabulary = {"<|bos|>": 0, "<|eos|>": 1}
        for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
            vocabulary[symbol] = len(vocabulary)
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        out = shutil.copytree(path, tmp_path / path.parent.name / path.name)
        save_tokenizer(tokenizer, out, max_length=256)
        return Path(out)

    return add


@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_from_the_original_and_the_compressed_checkpoint(
    family: str,
    checkpoint: Callable[[str], Path],
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    with_tokenizer: Callable[[Path], Path],
) -> None:
    config = CiuicConfig(bits=4.25, policy="uniform")
    original = pipeline(
        "text-generation",
        model=str(with_tokenizer(checkpoint(family))),
        model_kwargs={"quantization_config": config},
    )
    compressed = pipeline("text-generation", model=str(with_tokenizer(saved(family))))
    texts = [
        p("ab c", max_new_tokens=8, do_sample=False, pad_token_id=1, return_tensors=True)
        for p in (original, compressed)
    ]
    assert original.model.ciuic_report.compressed == compressed.model.ciuic_report.compressed
    assert texts[0] == texts[1]
    inputs = original.tokenizer("ab c", return_tensors="pt")["input_ids"]
    tokens = load(saved(family)).generate(inputs, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert texts[0][0]["generated_token_ids"] == tokens[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampled", [False, True])
def test_every_cache_gives_the_tokens_of_the_dequantized_model(
    family: str,
    sampled: bool,
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    ids: torch.Tensor,
) -> None:
    """In float32, where the order of summing is too small a difference to change a token."""
    model = load(saved(family), dtype=torch.float32)
    dense = load(saved(family), dtype=torch.float32).dequantize()
    options = {"max_new_tokens": 10, "do_sample": sampled, "pad_token_id": 1, "eos_token_id": None}
    results = []
    for cache in CACHES:
        for one in (model, dense):
            set_seed(3)
            results.append(one.generate(ids, **options, **cache))
    assert results[0].shape == (2, ids.shape[1] + 10)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_sampling_is_repeatable(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = load(saved("v3_fp8"))
    tokens = []
    for seed in (1, 1, 2):
        set_seed(seed)
        tokens.append(model.generate(ids, max_new_tokens=12, do_sample=True, eos_token_id=None))
    assert torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0], tokens[2])


def test_a_batch_with_padding(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    model = load(saved("v3_bf16"), dtype=torch.float32)
    alone = model(ids[:1, :5]).logits[:, -1]
    padded = torch.ones(2, 8, dtype=torch.long)
    padded[0, 3:], padded[1] = ids[0, :5], ids[1, :8]
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    batch = model(padded, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp(min=0)).logits
    torch.testing.assert_close(batch[0, -1], alone[0], atol=1e-4, rtol=1e-4)
