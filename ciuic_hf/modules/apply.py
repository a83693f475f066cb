"""Compressing the weights of a loaded model in place, one module at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

from ciuic_hf.compressor.blocks import nonzeros_of
from ciuic_hf.config import CompressionIntent
from ciuic_hf.errors import CiuicError
from ciuic_hf.memory import release_freed_memory
from ciuic_hf.modules.allocation import adapt_targets, allocate_targets, is_pooled
from ciuic_hf.modules.packed import TAGS, PackedModule
from ciuic_hf.modules.siblings import group_siblings
from ciuic_hf.modules.swap import adopt_module, compressed_modules
from ciuic_hf.modules.targets import Kept, Target, find_targets
from ciuic_kernels import PackedTensor, codec_by_id
from ciuic_kernels.codecs.raw16 import RAW_FP16
from ciuic_kernels.codecs.sparse import SparseCodec
from ciuic_kernels.codecs.zero import ZeroCodec
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.layout import validate
from ciuic_kernels.packing import FLOAT_DTYPES, decode_strips, encode_tensor

_WAY_OUT = "compress while loading instead: from_pretrained(..., quantization_config=CiuicConfig(...))"
_TRIM_WEIGHTS = 1 << 20
_BAND_WEIGHTS = 1 << 20  # decoded at a time to measure an error


@dataclass(frozen=True)
class Outcome:
    """What was compressed, what was kept and why, and by name the relative error where weights were dropped."""

    targets: list[Target]
    kept: list[Kept]
    errors: dict[str, float]


Choose = Callable[[Mapping[str, str]], tuple[list[Target], list[Kept]]]
"""Given the ties (name -> first name of the same parameter): what becomes of each weight."""


Encode = Callable[[str, Tensor, Tensor], PackedTensor]
"""Given name, weight and codec ids ``[..., strips, kblocks]`` of a parameter: the same, encoded."""


def _encode_nearest(_name: str, weight: Tensor, codec_ids: Tensor) -> PackedTensor:
    return encode_tensor(weight, codec_ids)


def compress_in_place(model: nn.Module, choose: Choose, encode: Encode = _encode_nearest) -> Outcome:
    """Compress a model that is in memory: above it, only one parameter is held twice.

    Everything is checked before the first weight changes. Tied weights stay tied. Compressed weights get no
    gradient, in training mode either.

    Args:
        encode: how weights are rounded; to the nearest by default.

    Raises:
        CiuicError: for a model that is compressed already, quantized in another way, offloaded, has adapters, or
            holds weights that are not finite; for settings that fit nothing.
    """
    _refuse(model)
    ties = tied_parameters(model)
    targets, kept = choose(ties)
    if not targets:
        reasons = sorted({k.reason for k in kept})
        raise CiuicError(
            f"Nothing of this {type(model).__name__} would be compressed: "
            + (f"its weights are kept ({'; '.join(reasons)})." if reasons else "it has no Linear or experts.")
        )
    for target in targets:
        _check_weight(target, model.get_parameter(target.name))
    by_module: dict[str, list[Target]] = {}
    for target in targets:
        by_module.setdefault(target.module_name, []).append(target)
    errors: dict[str, float] = {}
    for name, group in by_module.items():
        errors |= _compress_module(model, name, group, ties, encode)
    group_siblings(model)
    return Outcome(targets, kept, errors)


def choose_for_module(
    model: nn.Module, intent: CompressionIntent, policy: str, ties: Mapping[str, str]
) -> tuple[list[Target], list[Kept]]:
    """What becomes of the weights of any module, by a policy of ``CiuicConfig``."""
    targets, kept = find_targets(model, intent, (), ties)
    targets = adapt_targets(targets, partial(count_pruned, model))
    if policy == "rate-distortion":
        pooled = [t for t in targets if is_pooled(t, intent)]
        targets, _ = allocate_targets(targets, intent, nonzeros=count_pruned(model, pooled))
    return targets, kept


def count_pruned(model: nn.Module, targets: Sequence[Target], _thorough: bool = True) -> dict[str, Tensor]:
    """A ``Survey`` of a loaded model."""
    counts = {t.name: nonzeros_of(model.get_parameter(t.name).detach()) for t in targets}
    return {name: nonzeros for name, nonzeros in counts.items() if nonzeros is not None}


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Name -> the first name of the same parameter, for every parameter that has several."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def _compress_module(
    model: nn.Module, name: str, targets: list[Target], ties: Mapping[str, str], encode: Encode
) -> dict[str, float]:
    """Compress the parameters of one module; returns the errors of those that lost weights."""
    module = model.get_submodule(name)
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:  # it calls the forward of the old class
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)
    dense = {target.parameter: module.get_parameter(target.parameter).detach() for target in targets}
    dtype = next(iter(dense.values())).dtype
    errors = {}
    packed_module = adopt_module(model, name, targets[0].parameter, targets[0].name, dtype)
    for target in targets:
        weight = dense.pop(target.parameter)
        if target.name in ties:
            _share(packed_module, target.parameter, model, ties[target.name])
            continue
        ids = target.codec_ids.expand(*weight.shape[:-2], *target.codec_ids.shape[-2:])
        packed_module.set_packed(target.parameter, encode(target.name, weight, ids))
        if any(isinstance(codec_by_id(i), SparseCodec | ZeroCodec) for i in ids.unique().tolist()):
            errors[target.name] = _relative_error(packed_module.packed(target.parameter), weight)
        if weight.device.type == "cpu" and weight.numel() > _TRIM_WEIGHTS:
            del weight
            release_freed_memory()
    packed_module.prepare()
    packed_module.__dict__["_is_hf_initialized"] = (
        True  # transformers gives uninitialised modules random weights
    )
    if hook is not None:
        add_hook_to_module(packed_module, hook)
    return errors


def _relative_error(packed: PackedTensor, weight: Tensor) -> float:
    """``||decoded - weight|| / ||weight||``, a band at a time; 0 for a weight of zeros."""
    grid, offsets = packed.grid, validate(packed)
    shape = (grid.rows, grid.cols)
    tags = packed.tags.view(grid.matrices, grid.strips, grid.kblocks, 2)
    at_once = max(1, _BAND_WEIGHTS // (grid.cols * BLOCK_ROWS))
    lost = total = 0.0
    for index, matrix in enumerate(weight.reshape(grid.matrices, *shape)):
        starts = offsets[index * grid.strips :]
        for first in range(0, grid.strips, at_once):
            strips = range(first, min(first + at_once, grid.strips))
            band = decode_strips(packed.arena, tags[index], starts, shape, strips, torch.float32)
            source = matrix[first * BLOCK_ROWS :][: len(band)].float()
            lost += float((band - source).square().sum())
            total += float(source.square().sum())
    return math.sqrt(lost / total) if total else 0.0


def _share(module: PackedModule, parameter: str, model: nn.Module, source: str) -> None:
    for suffix in ("", TAGS):
        module.register_parameter(parameter + suffix, model.get_parameter(source + suffix))


def _refuse(model: nn.Module) -> None:
    """Raise CiuicError for a model that cannot be compressed in place, whatever the settings."""
    if not isinstance(model, nn.Module):
        raise CiuicError(f"Only a torch.nn.Module can be compressed, got {type(model).__name__}.")
    if next(compressed_modules(model), None) is not None:
        raise CiuicError(
            "This model is compressed by Ciuic already; load the original, or turn this one back with "
            "model.dequantize() where it has that."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
        raise CiuicError(f"This model is quantized already ({_word(method)}); load it in full precision.")
    if hasattr(model, "peft_config") or any("lora" in type(m).__name__.lower() for m in model.modules()):
        raise CiuicError("This model has adapters; compress the model first, then add them.")
    for name, module in model.named_modules():
        offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
        for parameter, weight in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter}" if name else parameter
            if weight.device.type == "meta" or offloaded:
                raise CiuicError(
                    f"{full_name} is not in memory (offloaded, or never loaded); load the whole model, or {_WAY_OUT}."
                )
            if type(weight.data) is not Tensor:
                raise CiuicError(
                    f"{full_name} is a {type(weight.data).__name__}, quantized or distributed already; load the model "
                    f"in full precision on one process, or {_WAY_OUT}."
                )


def _word(method: Any) -> str:
    return str(getattr(method, "value", method))


def _check_weight(target: Target, weight: Tensor) -> None:
    """Raise CiuicError for a weight that cannot be encoded."""
    keep = f'or keep it as it is with {{"{target.name}": "raw"}}'
    if weight.dtype not in FLOAT_DTYPES:
        raise CiuicError(
            f"{target.name} is {weight.dtype}; Ciuic compresses bfloat16, float16 and float32: convert the model, "
            f"{keep}."
        )
    if weight.dtype != RAW_FP16.dtype and bool((target.codec_ids == RAW_FP16.id).any()):
        raise CiuicError(
            f"{RAW_FP16.name} keeps float16 weights only and {target.name} is {weight.dtype}; {keep}."
        )
    if not all(math.isfinite(float(bound)) for bound in torch.aminmax(weight.detach())):
        raise CiuicError(f"{target.name} holds NaN or infinite weights; repair them, {keep}.")
