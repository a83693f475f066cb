"""Streaming converters: checkpoint tensors go into compressed blocks one at a time, experts one by one.

transformers collects the checkpoint tensors of a parameter as deferred reads and hands them to a converter. Its
own converter for experts reads all of them, merges, and only then lets a quantizer work; these read, dequantize,
merge and encode one expert at a time into an arena that was allocated once.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import fp8
from ciuic_hf.hf.encoder import Part
from ciuic_hf.modules.packed import PackedModule
from ciuic_kernels.format import BLOCK_ROWS
from ciuic_kernels.packing import FLOAT_DTYPES

Read = Callable[[], Tensor]
SCALE_PATTERN, WEIGHT_PATTERN = r"\.weight_scale_inv$", r"\.weight$"


def _packed_shape(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """The logical shape of a compressed parameter, None for one that is kept."""
    module_name, _, parameter = name.rpartition(".")
    module = model.get_submodule(module_name)
    return module.packed_shapes.get(parameter) if isinstance(module, PackedModule) else None


class EncodingConverter(WeightConverter):
    """What all converters here share: cheap copies. transformers deep-copies a converter for every tensor of a file."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        clone = copy.copy(self)
        clone.collected_tensors, clone.layer_targets = defaultdict(list), defaultdict(set)
        return clone


class WeightEncoder(EncodingConverter):
    """Every ``*.weight`` that no model-specific converter takes: encoded, or passed on as it is."""

    __slots__ = ("block",)

    def __init__(self, block: fp8.Block | None) -> None:
        # The operation is never run: convert() is replaced. transformers wants at least one.
        super().__init__([SCALE_PATTERN, WEIGHT_PATTERN], ".weight", operations=[MergeModulelist(dim=0)])
        self.block = block

    def convert(
        self, layer_name: str, model: Any = None, hf_quantizer: Any = None, loading_info: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        reads = {pattern: self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors)}
        if WEIGHT_PATTERN not in reads:
            raise CiuicError(
                f"{layer_name}_scale_inv is in the checkpoint without its weight; a shard is missing."
            )
        weight: Tensor = reads[WEIGHT_PATTERN][0]()
        scale: Tensor | None = reads[SCALE_PATTERN][0]() if SCALE_PATTERN in reads else None
        shape = _packed_shape(model, layer_name)
        if shape is None:
            dtype = hf_quantizer.dtype_of(model, layer_name)
            return {layer_name: _dense(layer_name, weight, scale, self.block, dtype)}
        encoder = hf_quantizer.encoder(layer_name, shape, self.block)
        encoder.add(0, [(weight, _required(layer_name, weight, scale, self.block))])
        return _with_ties(model, encoder.finish(), loading_info)


class ExpertsEncoder(EncodingConverter):
    """Experts that the model merges: ``experts.*.gate_proj.weight`` ... -> ``experts.gate_up_proj``.

    Runs the model's own operations on one expert at a time, so it needs to know nothing of how they are merged;
    where they only put matrices below each other, each is encoded straight to its rows.
    """

    __slots__ = ("block", "weights")

    def __init__(self, original: Any, block: fp8.Block | None) -> None:
        self.weights = [_anchored(pattern) for pattern in original._original_source_patterns]
        scales = [_scale_pattern(pattern) for pattern in self.weights]
        targets = list(original._original_target_patterns)
        super().__init__(scales + self.weights, targets, operations=list(original.operations))
        _copy_scope(original, self)
        self.block = block

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        reads = {pattern: self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors)}
        context = {"full_layer_name": layer_name, "model": model, "config": config}
        shape = _packed_shape(model, layer_name)
        if shape is None:
            return {layer_name: self._merged(layer_name, reads, model.get_parameter(layer_name), context)}
        self._check_counts(layer_name, reads, shape[0])
        encoder = hf_quantizer.encoder(layer_name, shape, self.block)
        for index in range(shape[0]):
            parts = self._read(layer_name, reads, index)
            if not self._stacks_strips(parts):
                parts = [(self._merge(layer_name, parts, context), None)]
            encoder.add(index, parts)
        return encoder.finish()

    def _merged(
        self, layer_name: str, reads: dict[str, list[Read]], placeholder: Tensor, context: dict[str, Any]
    ) -> Tensor:
        """All experts of a parameter that is kept: ``[E, N, K]`` in the model's dtype."""
        self._check_counts(layer_name, reads, len(placeholder))
        dense = None
        for index in range(len(placeholder)):
            expert = self._merge(layer_name, self._read(layer_name, reads, index), context)
            if dense is None:
                dense = torch.empty(placeholder.shape, dtype=placeholder.dtype, device=expert.device)
            dense[index] = expert
        assert dense is not None
        return dense

    def _check_counts(self, layer_name: str, reads: dict[str, list[Read]], experts: int) -> None:
        for pattern in self.weights:
            found = len(reads.get(pattern, []))
            scales = len(reads.get(_scale_pattern(pattern), []))
            if found != experts or scales not in (0, experts):
                raise CiuicError(
                    f"{layer_name} needs {experts} experts but the checkpoint has {found} tensors {pattern} "
                    f"({scales} scales); a shard is missing or config.json belongs to another model."
                )

    def _read(self, layer_name: str, reads: dict[str, list[Any]], index: int) -> list[Part]:
        """The weights of one expert, with their scales, in the order of the patterns."""
        parts: list[Part] = []
        for pattern in self.weights:
            weight = _take(reads[pattern], index)
            scales = reads.get(_scale_pattern(pattern))
            scale = _take(scales, index) if scales else None
            parts.append((weight, _required(layer_name, weight, scale, self.block)))
        return parts

    def _stacks_strips(self, parts: list[Part]) -> bool:
        """Whether merging an expert only puts whole strips below each other: then nothing has to be copied."""
        stack, *rest = self.operations
        by_rows = stack.dim == 0 and (not rest or [(type(op), op.dim) for op in rest] == [(Concatenate, 1)])
        return by_rows and all(weight.shape[0] % BLOCK_ROWS == 0 for weight, _ in parts[:-1])

    def _merge(self, layer_name: str, parts: list[Part], context: dict[str, Any]) -> Tensor:
        """One expert, merged by the model's own operations: ``[N, K]``."""
        merging: dict[str, Any] = {}
        for pattern, (weight, scale) in zip(self.weights, parts, strict=True):
            if scale is not None:
                assert self.block is not None
                weight = fp8.dequantize(layer_name, weight, scale, self.block)
            merging[pattern] = [weight]
        for operation in self.operations:
            merging = operation.convert(
                merging, source_patterns=self.weights, target_patterns=self.target_patterns, **context
            )
        merged = next(iter(merging.values()))
        merged = merged[0] if isinstance(merged, list) else merged
        return merged[0] if merged.dim() == 3 else merged


class FusedEncoder(EncodingConverter):
    """Experts that the checkpoint already keeps fused: one tensor ``[E, N, K]`` under the parameter's name."""

    __slots__ = ()

    def __init__(self, parameter: str) -> None:
        super().__init__([rf"\.{parameter}$"], f".{parameter}", operations=[MergeModulelist(dim=0)])

    def convert(
        self, layer_name: str, model: Any = None, hf_quantizer: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        (reads,) = (self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors))
        fused = reads[0]()
        shape = _packed_shape(model, layer_name)
        if shape is None:
            return {layer_name: fused.to(model.get_parameter(layer_name).dtype)}
        encoder = hf_quantizer.encoder(layer_name, shape, None)
        if len(fused) != shape[0]:
            raise CiuicError(
                f"{layer_name} is {list(shape)} in this model but the checkpoint has {list(fused.shape)}."
            )
        for index, expert in enumerate(fused):
            encoder.add(index, [(expert, None)])
        return encoder.finish()


class ResultEncoder(EncodingConverter):
    """Any other converter of the model (fused or split projections): its results are encoded."""

    __slots__ = ()

    @classmethod
    def wrap(cls, original: Any) -> ResultEncoder:
        wrapped = cls(
            list(original._original_source_patterns),
            list(original._original_target_patterns),
            operations=list(original.operations),
        )
        _copy_scope(original, wrapped)
        return wrapped

    def convert(
        self, layer_name: str, model: Any = None, hf_quantizer: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        converted = super().convert(layer_name, model=model, hf_quantizer=hf_quantizer, **kwargs)
        results: dict[str, Tensor] = {}
        for name in list(converted):
            value = converted.pop(name)
            tensor = value[0] if isinstance(value, list) else value
            shape = _packed_shape(model, name)
            if shape is not None:
                encoder = hf_quantizer.encoder(name, shape, None)
                for index, matrix in enumerate(tensor if tensor.dim() == 3 else tensor.unsqueeze(0)):
                    encoder.add(index, [(matrix, None)])
                results |= encoder.finish()
            else:
                results[name] = tensor
        return results


ENCODERS = (WeightEncoder, ExpertsEncoder, FusedEncoder, ResultEncoder)


def streaming_conversions(
    conversions: list[Any], expert_parameters: set[str], block: fp8.Block | None
) -> list[Any]:
    """The model's conversions with every converter replaced by one that encodes; the general one comes last.

    Args:
        expert_parameters: last name components of the fused expert parameters, such as ``gate_up_proj``.
    """
    updated = []
    for conversion in conversions:
        if not isinstance(conversion, WeightConverter):
            updated.append(conversion)
        elif isinstance(conversion.operations[0], MergeModulelist):
            updated.append(ExpertsEncoder(conversion, block))
        else:
            updated.append(ResultEncoder.wrap(conversion))
    fused = [FusedEncoder(parameter) for parameter in sorted(expert_parameters)]
    return [*updated, *fused, WeightEncoder(block)]


def _with_ties(model: Any, results: dict[str, Tensor], loading_info: Any) -> dict[str, Tensor]:
    """The results under the names tied to theirs too, unless the file has those: on disk they need a place."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    absent = {name: source for name, source in ties.items() if name in loading_info.missing_keys}
    return results | {name: results[source] for name, source in absent.items() if source in results}


def _copy_scope(source: Any, target: Any) -> None:
    target.scope_prefix, target.base_model_prefix = source.scope_prefix, source.base_model_prefix


def _anchored(pattern: str) -> str:
    return pattern if pattern.endswith("$") else f"{pattern}$"


def _scale_pattern(weight_pattern: str) -> str:
    return f"{weight_pattern.removesuffix('$')}{fp8.SCALE_SUFFIX}$"


def _take(reads: list[Any], index: int) -> Tensor:
    """Read one tensor and drop its reader, so that nothing keeps it alive."""
    read, reads[index] = reads[index], None
    return read()


def _required(name: str, weight: Tensor, scale: Tensor | None, block: fp8.Block | None) -> Tensor | None:
    """The scale of an FP8 weight, None for others. Raises CiuicError when one is there without the other."""
    is_fp8 = weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    if is_fp8 and (scale is None or block is None):
        raise CiuicError(
            f"{name} is FP8 but has no weight_scale_inv or config.json no fp8 quantization_config; a shard is missing "
            "or the checkpoint is incomplete."
        )
    return scale if is_fp8 else None


def _dense(
    name: str, weight: Tensor, scale: Tensor | None, block: fp8.Block | None, dtype: torch.dtype
) -> Tensor:
    """A weight that is kept: FP8 is dequantized with unrounded scales, the rest arrives in its final dtype."""
    scale = _required(name, weight, scale, block)
    if scale is None:
        return weight if weight.dtype in FLOAT_DTYPES and block is None else weight.to(dtype)
    assert block is not None
    return fp8.dequantize(name, weight, scale, block).to(dtype)
