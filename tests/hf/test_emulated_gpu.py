"""Whole models in bfloat16 on the kernels as they are compiled for a GPU, executed instruction by instruction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import ciuic_hf
from ciuic_hf.demo import bf16_path
from ciuic_kernels.attention import AttentionChoice
from tests.triton.emulator.launch import emulated

pytestmark = pytest.mark.slow

Load = Callable[..., Any]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 1, "max_new_tokens": 6}
NOISE = 1.5
"""How much larger the error of a compressed model may be than that of its weights as a plain bfloat16 model: both round
as often, at other places."""


def error(logits: Tensor, exact: Tensor) -> float:
    return float((logits.float() - exact).norm() / exact.norm())


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("v3_fp8", {"bits": 4.25}),
        ("v3_fp8", {"bits": 3.1, "policy": "rate-distortion"}),
        ("deepseek_v2", {"bits": 4.25, "policy": "rate-distortion"}),
        ("qwen2_tied", {"bits": 8}),
        ("llama_wide", {"bits": 2.5, "policy": "rate-distortion"}),
        ("qwen3_moe", {"bits": 5.25}),
    ],
)
def test_as_exact_as_plain_bfloat16(
    family: str,
    settings: dict[str, Any],
    tokens: int,
    capability: int,
    checkpoint: Callable[[str], Path],
    load: Load,
    ids: Tensor,
) -> None:
    directory, short = checkpoint(family), ids.repeat(1, 8)[:1, :tokens]
    with torch.no_grad():
        exact = load(directory, dtype=torch.float32, **settings).dequantize()(short).logits
        plain = load(directory, dtype=torch.bfloat16, **settings).dequantize()(short).logits
    with emulated(capability) as gpu, torch.no_grad():
        logits = load(directory, dtype=torch.bfloat16, **settings)(short).logits
    assert {"linear_kernel", "embedding_kernel"} <= {launch.kernel for launch in gpu.launches}
    assert error(logits, exact) < NOISE * error(plain, exact)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["v3_bf16", "qwen2_tied"])
def test_generates_from_a_compressed_cache(
    family: str, bits: int, capability: int, checkpoint: Callable[[str], Path], load: Load, ids: Tensor
) -> None:
    """Prompt, packing and steps with the attention kernel: the same logits as with torch's tiles, to rounding."""
    prompt = ids.repeat(1, 20)[:1, :230]
    runs = {}
    for name in ("tiles", "kernel"):
        with emulated(capability) as gpu:
            config = ciuic_hf.CiuicConfig(bits=8, cache_bits=bits)
            model = load(checkpoint(family), quantization_config=config, dtype=torch.bfloat16)
            with pytest.MonkeyPatch.context() as patch:
                if name == "tiles":
                    patch.setattr("ciuic_hf.runtime.cache.fused.attention_choice", _tiles)
                runs[name] = model.generate(
                    prompt, output_logits=True, return_dict_in_generate=True, **GREEDY
                )
        attended = {launch.kernel for launch in gpu.launches} & {"heads_kernel", "latents_kernel"}
        assert bool(attended) == (name == "kernel")
    for step in (1, 2):
        assert error(runs["kernel"].logits[step], runs["tiles"].logits[step].float()) < 0.03


def _tiles(*arguments: Any) -> AttentionChoice:
    return AttentionChoice("tiles", None, "for comparison")


def test_the_demo_model_writes() -> None:
    """A trained DeepSeek-V3 in miniature, its blocks of several kinds: words of its text, bit for bit in any order."""
    tokenizer = AutoTokenizer.from_pretrained(bf16_path())
    ids = tokenizer("In the beginning God created the", return_tensors="pt").input_ids
    written = []
    for order in ("forwards", 7):
        with emulated(80, order), torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(
                bf16_path(), quantization_config=ciuic_hf.CiuicConfig(bits=4.25), dtype=torch.bfloat16
            )
            written.append(model.generate(ids, **GREEDY))
    assert torch.equal(*written)
    assert tokenizer.decode(written[0][0]).startswith("<|bos|>In the beginning God created the")
    assert written[0].shape[1] == ids.shape[1] + GREEDY["max_new_tokens"]
