"""``apply_ciuic_compression``: a model that is in memory already, compressed in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import nn
from transformers.core_model_loading import PrefixChange, WeightConverter

from ciuic_hf.config import ADAPTIVE, CompressionIntent, Setting
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import prefill
from ciuic_hf.hf.choosing import choose, describe
from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.hf.quantizer import CiuicQuantizer, leave_bias, tie_tags
from ciuic_hf.hf.reporting import build_report
from ciuic_hf.hf.rounding import Rounding
from ciuic_hf.memory import PeakMemory
from ciuic_hf.modules.apply import (
    Outcome,
    choose_for_module,
    compress_in_place,
    count_pruned,
    tied_parameters,
)
from ciuic_hf.modules.reporting import report_of
from ciuic_hf.modules.targets import Kept, Target
from ciuic_hf.planning.moments import InputMoments

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
        ``from_pretrained`` compressed, with the same bytes. Compressed weights are not trained; LoRA is.

    Raises:
        CiuicError: for bad settings, and a model that is compressed already, quantized in another way, offloaded,
            has adapters or holds weights that are not finite. The model is then as it was.
    """
    config = _as_config(compression_config, bits)
    measured, started = PeakMemory(), time.perf_counter()
    is_transformers = _is_pretrained(model)
    if not is_transformers:
        _refuse_files(config)
    rounding = Rounding(InputMoments(config.calibration)) if config.calibration is not None else None
    with measured:
        if rounding is not None:
            choose = partial(_choose_calibrated, model, config, rounding.moments)
            outcome = compress_in_place(model, choose, rounding.encode_parameter)
        else:
            choose = partial(_choose_for_transformers if is_transformers else _choose_for_any, model, config)
            outcome = compress_in_place(model, choose)
    if is_transformers:
        stored = _attach(model, config, outcome)
        report = build_report(model, stored, outcome.errors)
        prefill.set_prefill_chunk(model, stored)
        report.prompt = prefill.describe(model, stored)
    else:
        roles = {target.name: target.role for target in outcome.targets}
        reasons = {k.name: k.reason for k in outcome.kept}
        tied = set(tied_parameters(model))
        report = report_of(model, roles, reasons, tied, type(model).__name__, outcome.errors)
    report.did, report.seconds = "Compressed", time.perf_counter() - started
    report.peak_nbytes, report.peak_of = measured.nbytes, measured.kind
    report.rounded = rounding.summary() if rounding is not None else None
    model.ciuic_report = report  # type: ignore[assignment]
    return model


def _as_config(given: Mapping[str, Setting] | CiuicConfig | None, bits: float | None) -> CiuicConfig:
    if not isinstance(given, CiuicConfig):
        return CiuicConfig(bits=CompressionIntent.bits if bits is None else bits, modules=given)
    if bits is not None:
        raise CiuicError(f"bits are in the CiuicConfig already ({given.bits}); give them once.")
    return copy.deepcopy(given)  # one CiuicConfig can serve many models


def _refuse_files(config: CiuicConfig) -> None:
    for option in ("memory", "plan", "sensitivity", "calibration"):
        if getattr(config, option) is not None:
            raise CiuicError(
                f"{option} is for models of transformers, whose config says what they are; give bits."
            )


def _choose_for_any(
    model: nn.Module, config: CiuicConfig, ties: Mapping[str, str]
) -> tuple[list[Target], list[Kept]]:
    return choose_for_module(model, config.intent, config.policy, ties)


def _choose_for_transformers(
    model: Any, config: CiuicConfig, ties: Mapping[str, str]
) -> tuple[list[Target], list[Kept]]:
    """As from_pretrained does."""
    if config.memory is not None and not isinstance(config.memory, int):
        raise CiuicError(
            f'memory must be one size for a loaded model, such as "22GiB", got {config.memory!r}.'
        )
    prefill.check(model, config)
    look = partial(count_pruned, model)
    choice = choose(model, config, model.dtype, device=model.device.type, survey=look, ties=ties)
    config.prefill_chunk = choice.run.prefill_chunk
    if config.memory is not None or config.plan is not None or config.policy == ADAPTIVE:
        config.bits = choice.bits  # what config.json will say was asked for
    return choice.targets, choice.kept


def _choose_calibrated(
    model: Any, config: CiuicConfig, moments: InputMoments, ties: Mapping[str, str]
) -> tuple[list[Target], list[Kept]]:
    """As from_pretrained does with a calibration."""
    targets, kept = _choose_for_transformers(model, config, ties)
    moments.check({target.name: target.shape for target in targets})
    return targets, kept


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
