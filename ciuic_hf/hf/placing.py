"""Which device holds what: splitting a model over devices, and what generation takes on each.

Devices work one after the other, as ``device_map`` has them: each holds its layers with their part of the cache, and
needs the whole of what is alive inside a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.allocation import Place
from ciuic_hf.planning.memory import Footprint
from ciuic_hf.planning.priors import layer_of
from ciuic_hf.report import human_bytes
from ciuic_kernels.format import ceil_div


class TooSmallError(CiuicError):
    """A budget below the smallest plan.

    Attributes:
        memory: bytes there are.
        several: whether they are of one device among others.
        weights: bytes of the smallest plan.
        needed: bytes that would do, with generation.
        context: the longest that fits with everything else as it is, 0 when none does.
        cache_bits: the most that fit with everything else as it is, 0 when none do.
    """

    def __init__(
        self,
        where: Place,
        memory: int,
        weights: int,
        beside: int,
        asked: int | None,
        batch: int,
        context: int,
        several: bool = False,
        cache_bits: int = 0,
    ) -> None:
        self.memory, self.weights, self.several = memory, weights, several
        self.needed, self.context, self.cache_bits = weights + beside, context, cache_bits
        ways = [f'memory="{ceil_div(self.needed, 1 << 20)}MiB"']
        if context > 0:
            ways.append(f"context={context}")
        if cache_bits:
            ways.append(f"cache_bits={cache_bits}")
        device = f" on device {where}" if several else ""
        super().__init__(
            f"The smallest plan needs {human_bytes(self.needed)}{device} and memory is {human_bytes(memory)}: "
            f"{human_bytes(weights)} for weights and {human_bytes(beside)} for generating with context={asked} "
            f"and batch={batch}; use {' or '.join(ways)}, or bits with a device_map that offloads modules."
        )


def place_of(device_map: Mapping[str, Place]) -> Callable[[str], Place]:
    """The device of a parameter by name: that of the longest module name that it starts with.

    The function raises CiuicError for a parameter that no entry covers.
    """

    def place(name: str) -> Place:
        module = name
        while module not in device_map:
            if not module:
                raise CiuicError(
                    f"The device_map says nothing of {name}; name its module or add an entry for ''."
                )
            module = module.rpartition(".")[0]
        return device_map[module]

    return place


def layers_on(names: Iterable[str], device_map: Mapping[str, Place]) -> dict[Place, int]:
    """How many layers each device has.

    Args:
        names: of parameters in all layers.
    """
    place = place_of(device_map)
    layers: dict[Place, set[int]] = {device: set() for device in device_map.values()}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            layers[place(name)].add(layer)
    return {device: len(here) for device, here in layers.items()}


def split_beside(beside: Footprint, layers: Mapping[Place, int]) -> dict[Place, int]:
    """What generation takes on each device, from the number of layers that each has."""
    if len(layers) == 1:
        return dict.fromkeys(layers, beside.total)
    total = max(1, sum(layers.values()))
    alive = beside.total - beside.cache - beside.slack
    share = 1 + beside.slack / max(1, beside.total - beside.slack)
    return {
        device: int(share * (beside.cache * here / total + (alive if here else beside.logits)))
        for device, here in layers.items()
    }


def split_layers(model: Any, weights: Mapping[str, int], count: int) -> dict[str, int]:
    """A device_map that puts whole layers on ``count`` devices, in order, about the same number of weights on each.

    Args:
        model: its tree of modules gives the names.
        weights: parameter name -> how many weights.

    Raises:
        CiuicError: for a model without layers, or with fewer than devices.
    """
    layers = {layer for layer in map(layer_of, weights) if layer is not None}
    if len(layers) < count:
        raise CiuicError(f"{len(layers)} layers cannot be spread over {count} devices; use fewer.")
    groups = _groups(model)
    sizes = [sum(n for name, n in weights.items() if f"{name}.".startswith(f"{group}.")) for group in groups]
    device_map: dict[str, int] = {}
    device, filled, left = 0, 0, sum(sizes)
    for group, size in zip(groups, sizes, strict=True):
        share = (left + filled) / (count - device)
        if device < count - 1 and filled and filled + size / 2 > share:
            device, filled = device + 1, 0
        device_map[group] = device
        filled, left = filled + size, left - size
    return device_map


def _groups(model: Any) -> list[str]:
    """Names of the modules that stay together: layers, and whatever stands beside them, in the model's order."""
    groups: list[str] = []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{group}.") for group in groups):
            continue
        below = (f"{name}.{child}." if name else f"{child}." for child, _ in module.named_modules() if child)
        if layer_of(f"{name}.") is not None or all(layer_of(child) is None for child in below):
            groups.append(name)
    return groups
