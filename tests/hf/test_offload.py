"""``device_map``: everywhere a weight may live, the logits are those of the model in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

DISK_LAYER = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
REST = {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS: dict[str, Any] = {
    "auto": "auto",
    "cpu": {"": "cpu"},
    "layer": DISK_LAYER | REST,
    "tables": {"model.embed_tokens": "disk", "lm_head": "disk"}
    | {f"model.layers.{i}": "cpu" for i in range(3)}
    | {"model.norm": "cpu", "model.rotary_emb": "cpu"},
    "all but one": {"model.layers": "disk", "model.embed_tokens": "cpu"}
    | {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"},
}


@pytest.mark.parametrize("device_map", MAPS)
@pytest.mark.parametrize("family", ["v3_bf16", "v3_fp8", "v3_fused", "compressed"])
def test_logits_do_not_depend_on_the_map(
    device_map: str,
    family: str,
    checkpoint: Callable[[str], Path],
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    compressed = family == "compressed"
    path, bits = (saved("v3_fp8"), None) if compressed else (checkpoint(family), 4.25)
    options = {"device_map": MAPS[device_map], "offload_folder": tmp_path / "offload"}
    model = load(path, bits, **options)
    whole = load(path, bits)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    assert torch.equal(model(ids).logits, whole(ids).logits)  # a second time, now from the hooks' own copies
    if "disk" in str(MAPS[device_map]):
        assert any(p.device.type == "meta" for p in model.parameters())
    assert model.ciuic_report.nbytes == whole.ciuic_report.nbytes


@pytest.mark.parametrize("family", ["v3_fp8", "compressed"])
def test_saved_while_offloaded(
    family: str,
    checkpoint: Callable[[str], Path],
    saved: Callable[[str], Path],
    load: Callable[..., Any],
    snapshot: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    path, bits = (saved("v3_fp8"), None) if family == "compressed" else (checkpoint(family), 4.25)
    model = load(path, bits, device_map=MAPS["layer"], offload_folder=tmp_path / "offload")
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    again, whole = load(tmp_path / "out").state_dict(), load(saved("v3_fp8")).state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.items())


def test_tied_tables_on_disk(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    device_map = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    path = checkpoint("qwen2_tied")
    model = load(path, 4.25, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(model(ids).logits, load(path, 4.25)(ids).logits)


def test_max_memory_counts_compressed_bytes(
    checkpoint: Callable[[str], Path], load: Callable[..., Any], tmp_path: Path
) -> None:
    """A budget that holds the compressed model, not the dense one, offloads nothing."""
    whole = load(checkpoint("v3_bf16"), 4.25).ciuic_report
    budget = int(1.3 * whole.nbytes)
    assert budget < whole.dense_nbytes
    model = load(
        checkpoint("v3_bf16"), 4.25, device_map="auto", max_memory={"cpu": budget}, offload_folder=tmp_path
    )
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_generates_while_offloaded(
    saved: Callable[[str], Path], load: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    model = load(saved("v3_fp8"), device_map=MAPS["layer"], offload_folder=tmp_path)
    tokens = [m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, load(saved("v3_fp8")))]
    assert torch.equal(*tokens)
