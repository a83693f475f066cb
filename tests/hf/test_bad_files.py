"""Damaged originals: each ends in one sentence that names the file or tensor and what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ciuic_hf import CiuicError

PREFIX = "model.layers.1.mlp.experts.2."
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture
def changed(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """``changed(family, {name: function or None})``: a copy with tensors changed, None removes one."""

    def make(family: str, changes: dict[str, Any]) -> Path:
        out = shutil.copytree(checkpoint(family), tmp_path / "changed")
        for file in out.glob("*.safetensors"):
            tensors = load_file(file)
            if not tensors.keys() & changes.keys():
                continue
            for name in tensors.keys() & changes.keys():
                change, tensor = changes[name], tensors.pop(name)
                if change is not None:
                    tensors[name] = change(tensor)
            save_file(tensors, file, metadata={"format": "pt"})
        return out

    return make


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Write one value somewhere into a tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float8_e4m3fn:
            raw = tensor.view(torch.uint8).clone()
            raw[-1, -1] = 0x7F
            return raw.view(torch.float8_e4m3fn)
        tensor = tensor.clone()
        tensor[-1, -1] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        ("v3_bf16", O_PROJ, O_PROJ),
        ("v3_bf16", "model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("v3_bf16", PREFIX + "up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("v3_fp8", "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"),
        ("v3_fp8", PREFIX + "down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
        ("v3_fp8", O_PROJ + "_scale_inv", O_PROJ),
        ("qwen2_tied", "model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_not_finite(
    value: float,
    family: str,
    stored: str,
    name: str,
    changed: Callable[..., Path],
    load: Callable[..., Any],
) -> None:
    path = changed(family, {stored: put(value) if not stored.endswith("mlp.down_proj.weight") else put(0)})
    with pytest.raises(CiuicError) as caught:
        load(path, 4)
    message = str(caught.value)
    assert name in message and "NaN or infinite" in message
    assert f'modules={{"{name}": "raw"}}' in message
    load(path, 4, {name: "raw"})  # the way out works


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_shard(
    keep: int, checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    path = shutil.copytree(checkpoint("v3_bf16"), tmp_path / "cut")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CiuicError, match=rf"{shard.name} is truncated.*again"):
        load(path, 4)


def test_missing_shard(checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path) -> None:
    path = shutil.copytree(checkpoint("v3_bf16"), tmp_path / "less")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(Exception, match=shard.name):
        load(path, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda header: b"{not json".ljust(len(header)),
        lambda header: json.dumps({"a": {"dtype": "F32"}}).encode().ljust(len(header)),
        lambda header: json.dumps({"a": 3}).encode().ljust(len(header)),
        lambda header: b"[3]".ljust(len(header)),
    ],
)
def test_damaged_header(
    make: Callable[[bytes], bytes],
    checkpoint: Callable[[str], Path],
    load: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path = shutil.copytree(checkpoint("v3_fused"), tmp_path / "damaged")
    shard = path / "model.safetensors"
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    shard.write_bytes(data[:8] + make(data[8 : 8 + length]) + data[8 + length :])
    with pytest.raises(CiuicError, match=r"model\.safetensors.*again"):
        load(path, 4)


@pytest.mark.parametrize(
    ("stored", "name", "grid"),
    [
        (O_PROJ, O_PROJ, (1, 1)),
        (PREFIX + "up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj", (2, 2)),
    ],
)
def test_scales_that_do_not_match(
    stored: str, name: str, grid: tuple[int, int], changed: Callable[..., Path], load: Callable[..., Any]
) -> None:
    path = changed("v3_fp8", {stored + "_scale_inv": lambda _: torch.ones(grid)})
    with pytest.raises(CiuicError) as caught:
        load(path, 4)
    assert name in str(caught.value) and "scales" in str(caught.value)
    assert "weight_block_size" in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "name"),
    [(O_PROJ, O_PROJ), (PREFIX + "up_proj.weight", "model.layers.1.mlp.experts.gate_up_proj")],
)
def test_scales_that_are_missing(
    stored: str, name: str, changed: Callable[..., Path], load: Callable[..., Any]
) -> None:
    with pytest.raises(CiuicError) as caught:
        load(changed("v3_fp8", {stored + "_scale_inv": None}), 4)
    assert name in str(caught.value) and "scale" in str(caught.value) and "missing" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        ("v3_bf16", O_PROJ, O_PROJ),
        ("v3_fp8", O_PROJ, O_PROJ),
        ("v3_bf16", PREFIX + "down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
        ("v3_fused", "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"),
        ("llama_untied", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_weight_that_is_missing(
    family: str, stored: str, name: str, changed: Callable[..., Path], load: Callable[..., Any]
) -> None:
    """Never random weights instead."""
    with pytest.raises(CiuicError) as caught:
        load(changed(family, {stored: None}), 4)
    assert name in str(caught.value) and "missing" in str(caught.value)


@pytest.mark.parametrize(
    ("family", "stored", "name"),
    [
        ("v3_bf16", O_PROJ, O_PROJ),
        ("v3_bf16", PREFIX + "down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
        ("v3_fused", "model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj"),
        ("v3_fp8", O_PROJ, O_PROJ),
    ],
)
def test_a_weight_of_another_shape(
    family: str, stored: str, name: str, changed: Callable[..., Path], load: Callable[..., Any]
) -> None:
    with pytest.raises(CiuicError) as caught:
        load(changed(family, {stored: lambda t: t[:-1].contiguous()}), 4)
    assert name in str(caught.value) and "checkpoint has" in str(caught.value)


def test_integer_weights(changed: Callable[..., Path], load: Callable[..., Any]) -> None:
    path = changed("v3_bf16", {O_PROJ: lambda t: t.to(torch.int8)})
    with pytest.raises(CiuicError, match=rf"{O_PROJ} is torch\.int8 without scales.*bf16"):
        load(path, 4)


@pytest.mark.parametrize("content", [None, "{}", '{"model_type": "llama"}'])
def test_a_directory_that_is_not_a_model(
    content: str | None, load: Callable[..., Any], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((OSError, ValueError)) as caught:
        load(tmp_path, 4)
    assert str(tmp_path) in str(caught.value)
