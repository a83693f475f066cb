"""``apply_ciuic_compression``: a model that is in memory already, compressed in place."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from transformers.core_model_loading import PrefixChange, WeightConverter

from ciuic_hf.config import CompressionIntent, Setting
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.choosing import describe, kept_in_float32
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.quantizer import CiuicQuantizer, leave_bias, tie_tags
from ciuic_hf.hf.reporting import build_report
from ciuic_hf.memory import PeakMemory
from ciuic_hf.modules.apply import Outcome, compress_in_place, tied_parameters
from ciuic_hf.modules.reporting import report_of

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def apply_ciuic_compression(
    model: AnyModule,
    compression_config: Mapping[str, Setting] | CiuicConfig | None = None,
    bits: float | None = None,
) -> AnyModule:
    """Compress the Linears, embeddings and fused experts of a loaded model in place.

    Args:
        model: any ``nn.Module``; all of its weights in memory, on any devices.
        compression_config: role or name pattern -> setting, as ``CiuicConfig(modules=...)`` takes it, for example
            ``{"linear": "quant4", "attention": 6, "embeddings": "quant8"}``; or a CiuicConfig.
        bits: bits per weight of what ``compression_config`` leaves open, 4.25 unless given.

    Returns:
        the model, with ``model.ciuic_report``. A transformers model then saves, loads and dequantizes like one that
        ``from_pretrained`` compressed, with the same bytes as its ``policy="uniform"``. Compressed weights are not
        trained; LoRA is.

    Raises:
        CiuicError: for bad settings, and a model that is compressed already, quantized in another way, offloaded,
            has adapters or holds weights that are not finite. The model is then as it was.
    """
    config = _as_config(compression_config, bits)
    measured, started = PeakMemory(), time.perf_counter()
    is_transformers = _is_pretrained(model)
    with measured:
        keep = kept_in_float32(model) if is_transformers else ()
        outcome = compress_in_place(model, config.intent, keep)
    if is_transformers:
        report = build_report(model, _attach(model, config, outcome), outcome.errors)
    else:
        roles = {target.name: target.role for target in outcome.targets}
        reasons = {k.name: k.reason for k in outcome.kept}
        tied = set(tied_parameters(model))
        report = report_of(model, roles, reasons, tied, type(model).__name__, outcome.errors)
    report.did, report.seconds = "Compressed", time.perf_counter() - started
    report.peak_nbytes, report.peak_of = measured.nbytes, measured.kind
    model.ciuic_report = report  # type: ignore[assignment]
    return model


def _as_config(given: Mapping[str, Setting] | CiuicConfig | None, bits: float | None) -> CiuicConfig:
    """The uniform plan: it needs to know neither the model's files nor how much its blocks matter."""
    if not isinstance(given, CiuicConfig):
        asked = CompressionIntent.bits if bits is None else bits
        return CiuicConfig(bits=asked, modules=given, policy="uniform")
    if bits is not None:
        raise CiuicError(f"bits are in the CiuicConfig already ({given.bits}); give them once.")
    for option in ("memory", "plan", "sensitivity", "calibration"):
        if getattr(given, option) is not None:
            raise CiuicError(
                f"{option} works while a model loads; pass the CiuicConfig to from_pretrained, or give bits."
            )
    return CiuicConfig(bits=given.bits, modules=given.modules, policy="uniform")


def _is_pretrained(model: nn.Module) -> bool:
    from transformers import PreTrainedModel  # late: it takes seconds

    return isinstance(model, PreTrainedModel)


def _attach(model: Any, config: CiuicConfig, outcome: Outcome) -> CiuicConfig:
    """Everything that from_pretrained leaves on a compressed model; returns the config that it saves."""
    quantizer = CiuicQuantizer(config, pre_quantized=False)
    stored = quantizer.quantization_config
    stored.parameters = describe(outcome.targets)
    stored.kept = {k.name: k.reason for k in outcome.kept}
    model._weight_conversions = [
        conversion for conversion in _conversions(model) if not isinstance(conversion, WeightConverter)
    ]
    model.hf_quantizer, model.config.quantization_config = quantizer, stored
    model.is_quantized, model.quantization_method = True, stored.quant_method
    for module in model.modules():
        if _is_pretrained(module):
            module.config._is_quantized = True
    tie_tags(model)
    model._adjust_bias = leave_bias
    return stored


def _conversions(model: Any) -> list[Any]:
    """How names and tensors of files became those of the model; a model made from scratch has only the default."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        return conversions
    from transformers.conversion_mapping import get_model_conversion_mapping

    return [
        c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)
    ]
