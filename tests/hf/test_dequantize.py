"""``model.dequantize()``: a plain model with the decoded weights, under the names of its architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ciuic_hf import CiuicError
from ciuic_hf.modules.packed import PackedModule
from ciuic_hf.modules.swap import compressed_modules
from ciuic_kernels.packing import decode_tensor


@pytest.mark.parametrize("family", ["v3_fp8", "v3_bf16", "qwen2_tied", "gpt_neox", "deepseek_v2"])
@pytest.mark.parametrize("reloaded", [False, True])
def test_every_weight_is_decoded(
    family: str,
    reloaded: bool,
    checkpoint: Callable[[str], Path],
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    ids: torch.Tensor,
) -> None:
    model = load(saved(family)) if reloaded else load(checkpoint(family), 4.25)
    expected = {
        f"{n}.{p}": decode_tensor(m.packed(p), torch.bfloat16)
        for n, m in compressed_modules(model)
        for p in m.packed_shapes
    }
    kept = {n: p.clone() for n, p in model.state_dict().items() if p.dtype != torch.uint8}
    dense = model.dequantize()
    assert not any(isinstance(m, PackedModule) for m in dense.modules())
    assert dense.state_dict().keys() == load(checkpoint(family)).state_dict().keys()
    for name, tensor in (expected | kept).items():
        assert torch.equal(dense.state_dict()[name], tensor), name
    assert torch.isfinite(dense(ids).logits).all()


@pytest.mark.parametrize("family", ["v3_fp8", "qwen2_tied", "gpt_neox"])
def test_it_saves_as_a_plain_model(
    family: str,
    checkpoint: Callable[[str], Path],
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    stored_in: Callable[[Path], Any],
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    dense = load(saved(family)).dequantize()
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert torch.equal(again(ids).logits, dense(ids).logits)
    plain = {name for name in stored_in(checkpoint(family)) if not name.endswith("_scale_inv")}
    assert set(stored_in(tmp_path)) == plain


def test_the_logits_are_those_of_the_compressed_model(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor
) -> None:
    for family in ("v3_fp8", "llama_untied", "deepseek_v32"):
        model = load(saved(family), dtype=torch.float32)
        logits = model(ids).logits
        torch.testing.assert_close(model.dequantize()(ids).logits, logits, atol=2e-5, rtol=1e-4)


def test_a_dtype_can_be_asked_for(saved: Callable[[str], Path], load: Callable[..., Any]) -> None:
    dense = load(saved("v3_bf16")).dequantize(torch.float32)
    assert dense.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


def test_tied_weights_stay_tied(saved: Callable[[str], Path], load: Callable[..., Any]) -> None:
    dense = load(saved("qwen2_tied")).dequantize()
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_offloaded_models_say_what_to_do(
    saved: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    device_map = {"model": "cpu", "lm_head": "disk"}
    model = load(saved("v3_bf16"), device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(CiuicError, match="without offloading"):
        model.dequantize()
