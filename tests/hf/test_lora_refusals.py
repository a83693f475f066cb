"""Adapters that compressed weights cannot carry are refused before anything is wrapped; the others work as proven."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ciuic_hf
from ciuic_hf import CiuicError
from ciuic_hf.hf.adapters.checks import FORWARD_ONLY
from ciuic_hf.modules.swap import restore_dense

peft = pytest.importorskip("peft", reason="the dev extra is not installed")


@pytest.fixture
def model(saved: Callable[[str], Path], load: Callable[..., Any]) -> Any:
    return load(saved("v3_bf16"), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "mica"}, "mica"),
        ({"init_lora_weights": "orthogonal"}, "orthogonal"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"target_modules": None, "target_parameters": ["o_proj.weight"]}, "in target_modules instead"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str, model: Any) -> None:
    structure = [name for name, _ in model.named_modules()]
    config = peft.LoraConfig(**({"target_modules": ["o_proj"]} | options))
    with pytest.raises(CiuicError, match=message):
        peft.get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == structure


@pytest.mark.parametrize(
    "options", [{"target_modules": ["experts"]}, {"target_parameters": ["gate_up_proj_tags"]}]
)
def test_experts_as_something_else(options: dict[str, Any], model: Any) -> None:
    with pytest.raises(CiuicError, match=r"target_parameters such as mlp.experts.gate_up_proj"):
        peft.get_peft_model(model, peft.LoraConfig(**({"target_modules": ["o_proj"]} | options)))


def test_dropout_on_experts_is_refused_by_peft(model: Any) -> None:
    config = peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"], lora_dropout=0.1)
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(model, config)


@pytest.mark.parametrize("method", ["LOHA", "LOKR", "HRA", "DELORA", "SHIRA", "TRAINABLE_TOKENS", "UNILORA"])
def test_methods_that_need_full_weights(method: str, model: Any) -> None:
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    with pytest.raises(CiuicError, match=f"{method} adapters need full weights"):
        peft.get_peft_model(model, config_class(target_modules=["o_proj"]))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(256, 192), nn.Linear(192, 256), nn.LayerNorm(256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(torch.relu(self.a(x))))


OPTIONS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": ["b"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 32},
    "OFT": {"oft_block_size": 32},
    "VBLORA": {"vector_length": 32, "num_vectors": 16},
    "GRALORA": {"r": 16, "gralora_k": 2},
}


@pytest.mark.filterwarnings("ignore")  # what PEFT says about each of its methods
@pytest.mark.parametrize("method", FORWARD_ONLY)
def test_methods_that_only_look_at_the_output(method: str) -> None:
    """Same numbers as over the same weights uncompressed; merging is refused, unloading is not."""
    torch.manual_seed(0)
    compressed = ciuic_hf.apply_ciuic_compression(Small(), bits=8)
    dense = copy.deepcopy(compressed)
    restore_dense(dense, torch.float32)
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    pair = []
    for base in (compressed, dense):
        torch.manual_seed(1)
        config = config_class(**({"target_modules": ["a", "b"]} | OPTIONS.get(method, {})))
        pair.append(peft.get_peft_model(base, config).eval())
    ours, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in pair)
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
    x, direction = torch.randn(5, 256), torch.randn(5, 256)
    with torch.no_grad():
        for name, parameter in ours.items():
            theirs[name].copy_(parameter.add_(0.05 * torch.randn_like(parameter)))
    outputs = [m(x) for m in pair]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    with pair[0].disable_adapter():
        assert not torch.allclose(pair[0](x), outputs[0], atol=1e-3)
    for y in outputs:
        (y * direction).sum().backward()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-4)
    if method != "LN_TUNING":
        with pytest.raises(CiuicError, match="cannot be merged into compressed weights"):
            pair[0].merge_and_unload()
        with pytest.raises(CiuicError, match="cannot be merged into compressed weights"):
            pair[0].merge_adapter()


@pytest.mark.parametrize("first", ["peft", "ciuic_hf"])
def test_either_import_order(first: str) -> None:
    """Hooks are there whichever comes first, are there once, and importing ciuic_hf imports no peft."""
    second = "ciuic_hf" if first == "peft" else "peft"
    code = f"""
import sys
import {first}
assert ("peft" in sys.modules) == ({first!r} == "peft")
import importlib.util
importlib.util.find_spec("peft")
import {second}
import peft, peft.utils, peft.tuners.tuners_utils as tuners
from ciuic_hf.hf.adapters import hooks
hooks.install()
assert tuners.BaseTuner.inject_adapter.wrapped_by_ciuic
assert not hasattr(tuners.BaseTuner.inject_adapter.__wrapped__, "wrapped_by_ciuic")
for module in (peft, peft.utils, peft.utils.other):
    assert module.prepare_model_for_kbit_training.wrapped_by_ciuic
assert not any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning:ciuic_hf", "-c", code], check=True)
