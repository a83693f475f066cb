"""The report of a model that is in memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import nn

from ciuic_hf.compressor.blocks import codec_counts
from ciuic_hf.inspection import VECTORS
from ciuic_hf.modules.packed import TAGS, PackedModule
from ciuic_hf.modules.swap import compressed_modules
from ciuic_hf.report import CompressedParameter, KeptParameter, Report
from ciuic_kernels import BlockGrid


def report_of(
    model: nn.Module,
    roles: Mapping[str, str],
    reasons: Mapping[str, str],
    tied: Collection[str],
    source: str,
    errors: Mapping[str, float] | None = None,
) -> Report:
    """What every parameter of a model became.

    Args:
        roles: name of each compressed parameter -> its role.
        reasons: name -> why it was kept, where there is a reason.
        errors: name -> relative error, where weights were dropped.
        tied: names of parameters that are another one under a second name; they are not counted.
    """
    compressed = [
        _compressed(f"{name}.{parameter}" if name else parameter, module, parameter, roles, errors or {})
        for name, module in compressed_modules(model)
        for parameter in module.packed_shapes
    ]
    compressed = [parameter for parameter in compressed if parameter.name not in tied]
    owned = {p.name for p in compressed} | {p.name + TAGS for p in compressed}
    kept = [
        KeptParameter(name, reasons.get(name, VECTORS), p.numel(), p.numel() * p.element_size())
        for name, p in model.state_dict(keep_vars=True).items()
        if name not in owned and name not in tied
    ]
    return Report(compressed, kept, source=source)


def _compressed(
    name: str, module: PackedModule, parameter: str, roles: Mapping[str, str], errors: Mapping[str, float]
) -> CompressedParameter:
    arena, tags = getattr(module, parameter), getattr(module, parameter + TAGS)
    shape = tuple(module.packed_shapes[parameter])
    weights = math.prod(shape)
    return CompressedParameter(
        name=name,
        role=roles.get(name, "linear"),
        shape=shape,
        weights=weights,
        nbytes=arena.numel() + math.prod(BlockGrid(shape).tags_shape),
        dense_nbytes=weights * module.dense_dtype.itemsize,
        codecs=codec_counts(tags.data),
        relative_error=errors.get(name),
    )
