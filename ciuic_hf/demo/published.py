"""Headers of the official checkpoints, names, shapes and dtypes without weights, from published config values.

A directory made here has config.json and safetensors files whose data is a hole: they take no space on the disk
and look complete, so that a plan for 671 B weights can be tested anywhere.

Sources: config.json and model.safetensors of the repositories, and README_WEIGHTS.md of DeepSeek-V3. Element counts
by dtype are those the hub states for each repository (``tests/demo/test_published.py``). How tensors are spread over
files is not reproduced. Not certain: that DeepSeek-V3.2-Exp stores the indexer's ``weights_proj`` in bfloat16 and
its ``k_norm`` in float32, and that its multi-token-prediction layer has an indexer too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ciuic_hf.demo.fp8 import BLOCK
from ciuic_hf.demo.official import BF16_MATRICES
from ciuic_hf.demo.shards import INDEX_NAME
from ciuic_hf.demo.synthetic import official_shapes

Entry = tuple[str, str, tuple[int, ...]]
"""Name, safetensors dtype, shape."""

SHARD_NBYTES = 4 << 30
_NBYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    }


_MLA: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
}
_V2 = _MLA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_nextn_predict_layers": 0,
    "rope_scaling": _yarn(0.707),
    "scoring_func": "softmax",
    "vocab_size": 102400,
}
_V3 = _MLA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rope_scaling": _yarn(1.0),
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
_DISTILL: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_QWEN = _DISTILL | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "vocab_size": 152064,
}
_LLAMA = _DISTILL | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def _sizes(hidden: int, intermediate: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    } | more


_LITE = {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1}
_FULL = {"q_lora_rank": 1536, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
_LITE |= {"moe_intermediate_size": 1408, "n_routed_experts": 64, "num_key_value_heads": 16}
_FULL |= {"moe_intermediate_size": 1536, "n_routed_experts": 160, "num_key_value_heads": 128}
_INDEXER = {"index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}
_V32_NAMES = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
_MATH = {"rope_theta": 10000, "vocab_size": 151936, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-ai/DeepSeek-V2-Lite": _V2 | _LITE | _sizes(2048, 10944, 27, 16, routed_scaling_factor=1.0),
    "deepseek-ai/DeepSeek-V2": _V2 | _FULL | _sizes(5120, 12288, 60, 128, routed_scaling_factor=16.0),
    "deepseek-ai/DeepSeek-V3": _V3,
    "deepseek-ai/DeepSeek-R1": _V3,
    "deepseek-ai/DeepSeek-V3.2-Exp": _V3 | _INDEXER | _V32_NAMES,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _QWEN | _sizes(1536, 8960, 28, 12) | _MATH,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": (
        _QWEN | _sizes(3584, 18944, 28, 28, rope_theta=10000, num_key_value_heads=4)
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN | _sizes(5120, 13824, 48, 40, rope_theta=1000000.0),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN | _sizes(5120, 27648, 64, 40, rope_theta=1000000.0),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA | _sizes(4096, 14336, 32, 32),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA | _sizes(8192, 28672, 80, 64),
}
"""Repository -> the fields of its config.json that decide about names, shapes and memory."""


def tensors_of(repository: str) -> Iterator[Entry]:
    """Every tensor that the files of an official repository hold."""
    config = CONFIGS[repository]
    fp8 = "quantization_config" in config
    for name, shape in _shapes(config):
        if name.endswith(("e_score_correction_bias", "k_norm.weight", "k_norm.bias")):
            yield name, "F32", shape
        elif fp8 and len(shape) == 2 and not name.endswith((*BF16_MATRICES, "weights_proj.weight")):
            yield name, "F8_E4M3", shape
            yield f"{name}_scale_inv", "F32", tuple(math.ceil(size / BLOCK) for size in shape)
        else:
            yield name, "BF16", shape


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    if "kv_lora_rank" not in config:
        yield from _dense_shapes(config)
        return
    mtp = config["num_nextn_predict_layers"] > 0
    for name, shape in official_shapes(SimpleNamespace(**config), mtp=mtp):
        if not name.endswith("e_score_correction_bias") or config["scoring_func"] == "sigmoid":
            yield name, shape
        if name.endswith("self_attn.o_proj.weight") and "index_head_dim" in config:
            yield from _indexer_shapes(config, name.removesuffix("o_proj.weight"))


def _indexer_shapes(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads, size, hidden = config["index_n_heads"], config["index_head_dim"], config["hidden_size"]
    yield f"{prefix}indexer.wq_b.weight", (heads * size, config["q_lora_rank"])
    yield f"{prefix}indexer.wk.weight", (size, hidden)
    yield f"{prefix}indexer.k_norm.weight", (size,)
    yield f"{prefix}indexer.k_norm.bias", (size,)
    yield f"{prefix}indexer.weights_proj.weight", (heads, hidden)


def _dense_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Qwen2 (with biases on queries, keys and values) and Llama."""
    hidden, heads, wide = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    shared = config["num_key_value_heads"] * (hidden // heads)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        for name, rows in (("q_proj", hidden), ("k_proj", shared), ("v_proj", shared)):
            yield f"{prefix}.self_attn.{name}.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield f"{prefix}.self_attn.{name}.bias", (rows,)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.mlp.gate_proj.weight", (wide, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (wide, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write_headers(repository: str, out_dir: Path | str) -> Path:
    """Write config.json, the index and files that hold headers and a hole; returns the directory."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    shards: list[list[Entry]] = [[]]
    room, total = SHARD_NBYTES, 0
    for entry in tensors_of(repository):
        nbytes = nbytes_of(entry)
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_NBYTES
        shards[-1].append(entry)
        room, total = room - nbytes, total + nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        path = out_dir / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(path, shard)
        weight_map |= {name: path.name for name, _, _ in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out_dir / INDEX_NAME).write_text(json.dumps(index) + "\n", encoding="utf-8")
    (out_dir / "config.json").write_text(json.dumps(CONFIGS[repository], indent=2) + "\n", encoding="utf-8")
    return out_dir


def nbytes_of(entry: Entry) -> int:
    """Bytes of one tensor in its file."""
    return math.prod(entry[2]) * _NBYTES[entry[1]]


def _write_shard(path: Path, shard: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        name, dtype, shape = entry
        begin, end = end, end + nbytes_of(entry)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def main() -> None:
    parser = argparse.ArgumentParser(description=write_headers.__doc__)
    parser.add_argument("repository", choices=CONFIGS)
    parser.add_argument("out_dir", type=Path)
    arguments = parser.parse_args()
    print(write_headers(arguments.repository, arguments.out_dir))


if __name__ == "__main__":
    main()
