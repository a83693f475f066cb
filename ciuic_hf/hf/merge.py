"""Lets a CiuicConfig be given for a checkpoint that is FP8 already.

transformers refuses a quantization_config of another class than the checkpoint's and has no hook in between, so
``AutoHfQuantizer.merge_quantization_configs`` is wrapped when ciuic_hf is imported. Nothing changes for any other
config (docs/adr/004).
"""

from __future__ import annotations

import copy
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.config import METHOD, CiuicConfig


def _as_dict(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else config.to_dict()


def merge_for_ciuic(checkpoint_config: Any, given: CiuicConfig) -> CiuicConfig | None:
    """The config to load with, or None when transformers' own rule applies (a checkpoint that is Ciuic's).

    Raises:
        CiuicError: for a checkpoint that is quantized in a way Ciuic cannot read.
    """
    source = _as_dict(checkpoint_config)
    method = str(getattr(source.get("quant_method"), "value", source.get("quant_method")))
    if method == METHOD:
        return None
    if method != "fp8":
        if source.get("quant_method") is None:  # old ones of bitsandbytes
            method = "a method that its config.json does not name"
        raise CiuicError(
            f"This checkpoint is already quantized with {method}; Ciuic compresses bf16, fp16, fp32 and FP8 "
            "originals. Load the original model, or load this one without a CiuicConfig."
        )
    merged = copy.deepcopy(given)
    merged.source_quantization = dict(source)
    return merged


def install() -> None:
    """Wrap ``merge_quantization_configs`` once."""
    original = AutoHfQuantizer.merge_quantization_configs
    if getattr(original, "wrapped_by_ciuic", False):
        return

    def merge_quantization_configs(
        cls: Any, quantization_config: Any, quantization_config_from_args: Any
    ) -> Any:
        if isinstance(quantization_config_from_args, CiuicConfig):
            merged = merge_for_ciuic(quantization_config, quantization_config_from_args)
            if merged is not None:
                return merged
        merged = original(quantization_config, quantization_config_from_args)
        bits = getattr(quantization_config_from_args, "cache_bits", None)
        if isinstance(merged, CiuicConfig) and bits is not None:
            merged.cache_bits = bits  # of the run, not of the file
        chunk = getattr(quantization_config_from_args, "prefill_chunk", None)
        is_another = merged is not quantization_config_from_args
        if isinstance(merged, CiuicConfig) and is_another and chunk not in (None, "auto"):
            merged.replaced_prefill_chunk, merged.prefill_chunk = merged.prefill_chunk, chunk
        return merged

    merge_quantization_configs.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = classmethod(merge_quantization_configs)
