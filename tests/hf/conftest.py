"""Tiny random models of every supported family, their weights read independently of Ciuic, and loading."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

import ciuic_hf
from ciuic_hf.demo.config import TINY_CONFIG
from ciuic_hf.demo.synthetic import random_deepseek_v3
from ciuic_hf.modules.swap import compressed_modules
from ciuic_hf.planning.uniform import codec_ids
from ciuic_kernels.packing import encode_tensor

logging.disable_progress_bar()  # and with it the table after a load

TABLE_BITS = 8
_LLAMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 264,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_MLA: dict[str, Any] = TINY_CONFIG | {"num_hidden_layers": 2, "pad_token_id": 1}
_BERT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 144,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_V32: dict[str, Any] = _MLA | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
_QWEN_MOE: dict[str, Any] = _LLAMA | {"moe_intermediate_size": 72, "num_experts": 4, "num_experts_per_tok": 2}
_WIDE: dict[str, Any] = _LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 512}

# family -> (transformers class, its config)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2ForCausalLM", _MLA | {"scoring_func": "softmax", "topk_method": "greedy"}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _V32),
    "qwen2_tied": ("Qwen2ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "qwen2_small": (
        "Qwen2ForCausalLM",
        _LLAMA | {"hidden_size": 128, "intermediate_size": 136, "tie_word_embeddings": True},
    ),
    "llama_untied": ("LlamaForCausalLM", _LLAMA | {"tie_word_embeddings": False}),
    "llama_wide": ("LlamaForCausalLM", _WIDE | {"tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _QWEN_MOE | {"head_dim": 40}),
    "gpt_neox": ("GPTNeoXForCausalLM", _LLAMA | {"num_key_value_heads": 4}),
    "bert": ("BertForMaskedLM", _BERT),
}
# DeepSeek-V3 in the official files -> options of random_deepseek_v3
V3: dict[str, dict[str, Any]] = {
    "v3_bf16": {"fp8": False, "max_shard_size": 300_000},
    "v3_fp8": {"fp8": True, "max_shard_size": 200_000},
    "v3_ue8m0": {"fp8": True, "ue8m0": True},
    "v3_mtp": {"fp8": True, "mtp": True},
    "v3_small": {"fp8": False, "hidden_size": 128, "num_hidden_layers": 2},
    "v3_wide_fp8": {"fp8": True, "hidden_size": 320, "kv_lora_rank": 152, "moe_intermediate_size": 136},
}
_DERIVED = ("v3_fused", "v3_e8m0_dtype", "v3_e8m0_bytes")


def _rewrite(source: Path, out: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """A copy of a single-file checkpoint with changed tensors."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def _build(name: str, out: Path, checkpoint: Callable[[str], Path]) -> None:
    if name in V3:
        random_deepseek_v3(out, seed=1, **(TINY_CONFIG | V3[name]))
    elif name in MODELS:
        class_name, options = MODELS[name]
        model_class = getattr(transformers, class_name)
        torch.manual_seed(2)
        model = model_class(model_class.config_class(**options)).to(torch.bfloat16)
        model.save_pretrained(out, max_shard_size="400KB")
    elif name == "v3_fused":
        out.mkdir()
        for file in checkpoint("v3_bf16").glob("*config.json"):
            shutil.copy(file, out)
        save_file(read_source(checkpoint("v3_bf16")), out / "model.safetensors", metadata={"format": "pt"})
    else:

        def as_e8m0(key: str, tensor: Tensor) -> Tensor:
            if not key.endswith("_scale_inv"):
                return tensor
            scales = tensor.to(torch.float8_e8m0fnu)
            assert torch.equal(scales.float(), tensor)
            return scales if name == "v3_e8m0_dtype" else scales.view(torch.uint8)

        _rewrite(checkpoint("v3_ue8m0"), out, as_e8m0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small run faster on one thread, and do not slow down when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family name -> directory of its checkpoint, built when first asked for. Read only."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        if not (root / name).exists():
            _build(name, root / name, get)
        return root / name

    return get


def read_files(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as it is stored."""
    return {
        name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()
    }


def _dequantized(weight: Tensor, scale: Tensor, block: list[int]) -> Tensor:
    """FP8 by the definition: one product for each block."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    dense, (height, width) = weight.float(), block
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            dense[i * height : (i + 1) * height, j * width : (j + 1) * width] *= scale[i, j].float()
    return dense


def read_source(directory: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names of the model: FP8 dequantized to float32, experts merged."""
    stored = read_files(directory)
    quantization = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
    tensors = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if not name.endswith("_scale_inv"):
            tensors[name.replace("embed_out", "lm_head")] = (  # the name GPT-NeoX has in files
                tensor if scale is None else _dequantized(tensor, scale, quantization["weight_block_size"])
            )
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name in list(tensors):
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            layer = experts.setdefault(match[1], {})
            layer.setdefault(int(match[2]), {})[match[3]] = tensors.pop(name)
    for name, layer in experts.items():
        parts = [layer[index] for index in range(len(layer))]
        tensors[f"{name}.gate_up_proj"] = torch.stack([torch.cat([p["gate"], p["up"]]) for p in parts])
        tensors[f"{name}.down_proj"] = torch.stack([p["down"] for p in parts])
    return tensors


@pytest.fixture(scope="session")
def source_of() -> Callable[[Path], dict[str, Tensor]]:
    """See :func:`read_source`."""
    return read_source


@pytest.fixture(scope="session")
def stored_in() -> Callable[[Path], dict[str, Tensor]]:
    """See :func:`read_files`."""
    return read_files


@pytest.fixture(scope="session")
def load() -> Callable[..., PreTrainedModel]:
    """``load(path, bits, modules=..., policy="uniform", cls=AutoModelForCausalLM, **from_pretrained)``.

    Without bits there is no CiuicConfig. The uniform policy is what a test can compute by itself.
    """

    def _load(
        path: Path,
        bits: float | None = None,
        modules: Any = None,
        cls: Any = AutoModelForCausalLM,
        policy: str = "uniform",
        **kwargs: Any,
    ) -> Any:
        if bits is not None:
            kwargs["quantization_config"] = ciuic_hf.CiuicConfig(bits=bits, modules=modules, policy=policy)
        return cls.from_pretrained(path, **kwargs)

    return _load


@pytest.fixture(scope="session")
def saved(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Callable[[str], Path],
    load: Callable[..., PreTrainedModel],
) -> Callable[[str], Path]:
    """Family name -> directory of its compressed checkpoint at 4.25 bits. Read only."""
    root = tmp_path_factory.mktemp("compressed")

    def get(name: str) -> Path:
        if not (root / name).exists():
            load(checkpoint(name), 4.25).save_pretrained(root / name, max_shard_size="100KB")
        return root / name

    return get


def encoded(source: Tensor, setting: float | str) -> tuple[Tensor, Tensor]:
    """Arena and tags of a parameter, encoded apart from any loading."""
    ids = codec_ids(tuple(source.shape[-2:]), setting)
    packed = encode_tensor(source, ids.expand(*source.shape[:-2], *ids.shape))
    return packed.arena, packed.tags


def table_or(bits: float) -> Callable[[str], float]:
    """The setting of each parameter when nothing but ``bits`` is asked for."""

    def setting(name: str) -> float:
        return (
            TABLE_BITS
            if re.search(r"embed_tokens|embed_in|word_embed|lm_head|embed_out|decoder", name)
            else bits
        )

    return setting


@pytest.fixture(scope="session")
def assert_encoded() -> Callable[..., None]:
    """``assert_encoded(model, source, setting_of_name)``: every compressed parameter is encode(source)."""

    def check(model: nn.Module, source: dict[str, Tensor], setting: Callable[[str], float | str]) -> None:
        tied = getattr(model, "all_tied_weights_keys", {})
        names = [f"{n}.{p}" for n, module in compressed_modules(model) for p in module.packed_shapes]
        assert names
        for name in names:
            weights = source[name] if name in source else source[tied[name]]
            arena, tags = encoded(weights, setting(name))
            assert torch.equal(model.get_parameter(name), arena), name
            assert torch.equal(model.get_parameter(f"{name}_tags"), tags), name

    return check


@pytest.fixture(scope="session")
def uniform() -> Callable[[float], Callable[[str], float]]:
    """See :func:`table_or`."""
    return table_or


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """A batch of token ids that every tiny model knows."""
    return torch.arange(2, 26).view(2, 12) * 11 % 290


@pytest.fixture
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    """``snapshot(directory)``: every file below it, by relative name."""

    def take(directory: Path) -> dict[str, bytes]:
        files = (Path(base) / name for base, _, names in os.walk(directory) for name in names)
        return {str(file.relative_to(directory)): file.read_bytes() for file in files}

    return take
