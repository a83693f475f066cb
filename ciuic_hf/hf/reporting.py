"""The report of a loaded model."""

from __future__ import annotations

import math
from typing import Any

from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.inspection import VECTORS, codec_counts
from ciuic_hf.modules.packed import TAGS, PackedModule
from ciuic_hf.modules.swap import compressed_modules
from ciuic_hf.report import CompressedParameter, KeptParameter, Report
from ciuic_kernels import BlockGrid


def build_report(model: Any, config: CiuicConfig) -> Report:
    """What every parameter of a loaded model became. Tied parameters are counted once."""
    tied = set(model.all_tied_weights_keys)
    compressed = [
        _compressed(f"{name}.{parameter}", module, parameter, config)
        for name, module in compressed_modules(model)
        for parameter in module.packed_shapes
        if f"{name}.{parameter}" not in tied
    ]
    owned = {p.name for p in compressed} | {p.name + TAGS for p in compressed}
    kept = [
        KeptParameter(name, config.kept.get(name, VECTORS), p.numel(), p.numel() * p.element_size())
        for name, p in model.state_dict(keep_vars=True).items()
        if name not in owned and name not in tied
    ]
    return Report(compressed, kept, source=model.config.name_or_path or type(model).__name__)


def _compressed(name: str, module: PackedModule, parameter: str, config: CiuicConfig) -> CompressedParameter:
    arena, tags = getattr(module, parameter), getattr(module, parameter + TAGS)
    shape = tuple(module.packed_shapes[parameter])
    weights = math.prod(shape)
    return CompressedParameter(
        name=name,
        role=config.parameters[name]["role"],
        shape=shape,
        weights=weights,
        nbytes=arena.numel() + math.prod(BlockGrid(shape).tags_shape),
        dense_nbytes=weights * module.dense_dtype.itemsize,
        codecs=codec_counts(tags.data),
    )
