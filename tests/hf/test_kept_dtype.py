"""A weight that the model keeps in float32 comes out of an FP8 file unrounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel

from ciuic_hf.demo.publish import dequantize_fp8_block
from tests.hf.conftest import read_files


def test_float32_out_of_fp8(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [*DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict, "kv_b_proj"]
    monkeypatch.setattr(DeepseekV3PreTrainedModel, "_keep_in_fp32_modules_strict", kept)
    model = load(checkpoint("v3_fp8"), 4.25)
    files = read_files(checkpoint("v3_fp8"))
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    weight = model.get_parameter(name)
    assert files[name].dtype == torch.float8_e4m3fn and weight.dtype == torch.float32
    assert torch.equal(weight, dequantize_fp8_block(files[name], files[f"{name}_scale_inv"]))
    reasons = {k.reason for k in model.ciuic_report.kept if "kv_b_proj" in k.name}
    assert reasons == {"the model keeps it in float32"}
