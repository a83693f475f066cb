"""Sensitivities without a measurement: by what a weight does, from ``configs/sensitivity.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from ciuic_hf.presets import read_preset

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter belongs to, None outside of layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def prior_sensitivity(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Relative sensitivity of each parameter: per weight that of its kind, times its weights.

    Only ratios mean something. ``first`` and ``last`` of the preset apply in the first and the last layer seen.

    Args:
        shapes: parameter name -> shape.
    """
    preset = read_preset("sensitivity")
    layers = [layer for layer in map(layer_of, shapes) if layer is not None]
    ends = {"first": min(layers, default=None), "last": max(layers, default=None)}
    return {
        name: math.prod(shape) * _per_weight(name, preset["per_weight"], ends)
        for name, shape in shapes.items()
    }


def _per_weight(name: str, kinds: Mapping[str, Mapping[str, float]], ends: Mapping[str, int | None]) -> float:
    parts = name.split(".")
    kind = next((k for k in kinds if all(part in parts for part in k.split("."))), None)
    if kind is None:
        return 1.0
    layer = layer_of(name)
    for end, value in kinds[kind].items():
        if end != "middle" and layer is not None and layer == ends[end]:
            return value
    return kinds[kind]["middle"]
