"""Publishes a transformers DeepSeek-V3 model in the official DeepSeek-V3 file format, in bf16 or FP8.

    python -m ciuic_hf.demo.publish --trained build --out models

writes models/bf16 and models/fp8 from the checkpoint and tokenizer that `ciuic_hf.demo.train` left in build.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_model
from tokenizers import Tokenizer
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerBase

from ciuic_hf.demo.config import BENCHMARK_CONFIG, CHECKPOINT_NAME, DEMO_CONFIG, TINY_CONFIG
from ciuic_hf.demo.fp8 import dequantize_fp8_block, quantize_fp8_block
from ciuic_hf.demo.official import stored_tensors, write_configs
from ciuic_hf.demo.shards import ShardWriter
from ciuic_hf.demo.synthetic import random_deepseek_v3
from ciuic_hf.demo.tokenizer import save_tokenizer

__all__ = [
    "BENCHMARK_CONFIG",
    "DEMO_CONFIG",
    "TINY_CONFIG",
    "dequantize_fp8_block",
    "official_tensors",
    "quantize_fp8_block",
    "random_deepseek_v3",
    "write_official",
]

_MAX_SHARD_SIZE = 5_000_000_000  # bytes, about that of DeepSeek's own shards


def official_tensors(model: DeepseekV3ForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the model's tensors under the official names, taking the fused experts apart.

    transformers holds the experts of a layer as gate_up_proj [E, 2I, H], gate above up, and down_proj
    [E, H, I]; the files hold gate_proj [I, H], up_proj [I, H] and down_proj [H, I] for each expert.
    """
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2, dim=0)
                yield f"{prefix}{expert}.gate_proj.weight", gate
                yield f"{prefix}{expert}.up_proj.weight", up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                yield f"{prefix}{expert}.down_proj.weight", down
        else:
            yield name, tensor


def write_official(
    model: DeepseekV3ForCausalLM,
    tokenizer: Tokenizer | PreTrainedTokenizerBase | None,
    out_dir: Path | str,
    *,
    fp8: bool,
    max_shard_size: int = _MAX_SHARD_SIZE,
    ue8m0: bool = False,
) -> list[Path]:
    """Writes weights, configs and tokenizer as DeepSeek publishes them; returns the safetensors files."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(out_dir, max_shard_size)
    for name, tensor in official_tensors(model):
        for stored_name, stored in stored_tensors(name, tensor.detach().cpu(), fp8=fp8, ue8m0=ue8m0):
            writer.add(stored_name, stored)
    write_configs(model.config, out_dir, fp8=fp8, ue8m0=ue8m0)
    if isinstance(tokenizer, Tokenizer):
        save_tokenizer(tokenizer, out_dir, max_length=model.config.max_position_embeddings)
    elif tokenizer is not None:
        tokenizer.save_pretrained(out_dir)
    return writer.close()


def main() -> None:
    """Publishes a training checkpoint in both formats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trained", type=Path, required=True, help="the --out directory of the training")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**DEMO_CONFIG))
    load_model(model, args.trained / CHECKPOINT_NAME)
    tokenizer = Tokenizer.from_file(str(args.trained / "tokenizer.json"))
    for name, fp8 in (("bf16", False), ("fp8", True)):
        write_official(model, tokenizer, args.out / name, fp8=fp8)
        size = sum(path.stat().st_size for path in (args.out / name).iterdir())
        print(f"{args.out / name}: {size:,} bytes")


if __name__ == "__main__":
    main()
