"""Token tables: of encoder-decoders, which share one three times, and of models whose vocabulary is to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ciuic_hf import CiuicConfig, CiuicError
from ciuic_hf.modules.swap import compressed_modules


def test_an_encoder_decoder_keeps_its_shared_table(tmp_path: Path) -> None:
    sizes = {"d_model": 128, "d_ff": 256, "d_kv": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 256}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(
        tmp_path / "plain"
    )
    model = T5ForConditionalGeneration.from_pretrained(
        tmp_path / "plain", quantization_config=CiuicConfig(bits=4.25)
    )
    reasons = {kept.name: kept.reason for kept in model.ciuic_report.kept}
    assert "tied to" in reasons["shared.weight"] and model.lm_head.weight is model.shared.weight
    assert len(list(compressed_modules(model))) == 5 + 9  # T5 keeps ``wo`` of each layer in float32
    ids = torch.arange(2, 20)[None]
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "compressed")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "compressed")
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), written)


@pytest.mark.parametrize("family", ["llama_untied", "qwen2_tied"])
def test_a_compressed_table_keeps_its_size(
    family: str, checkpoint: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model = load(checkpoint(family), bits=4)
    table = model.get_input_embeddings()
    rows = table.num_embeddings
    assert model.resize_token_embeddings(rows) is table and model.resize_token_embeddings() is table
    for options in ({"new_num_tokens": rows + 1}, {"pad_to_multiple_of": 64}):
        with pytest.raises(CiuicError, match=f"keep their {rows} rows, .* were asked for; load with"):
            model.resize_token_embeddings(**options)
    assert model.config.vocab_size == rows
    model = load(checkpoint(family), bits=4, modules={"embeddings": "raw", "lm_head": "raw"})
    assert model.resize_token_embeddings(rows + 1).weight.shape[0] == rows + 1 == model.config.vocab_size
