"""What is known about a device, asked once; importing this touches none."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch

MIN_CAPABILITY = 80  # bfloat16 MMA and asynchronous copies


@dataclass(frozen=True)
class DeviceFacts:
    """What the choice of a kernel depends on.

    Attributes:
        kind: ``cpu``, ``cuda``, ...
        name: the GPU's name, empty for others.
        capability: compute capability times ten, 0 for others.
        processors: streaming multiprocessors, 0 for others.
        reason: why the Triton kernels cannot run on it; empty when they can.
    """

    kind: str
    name: str = ""
    capability: int = 0
    processors: int = 0
    reason: str = ""


def device_facts(device: torch.device) -> DeviceFacts:
    """The facts of a device."""
    if device.type != "cuda":
        return DeviceFacts(device.type, reason=f"there are no kernels for {device.type}")
    return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_facts(index: int) -> DeviceFacts:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    name = str(properties.name)
    reason = ""
    if torch.version.hip is not None:
        reason = f"the kernels are written for NVIDIA GPUs, this is {name}"
    elif capability < MIN_CAPABILITY:
        reason = f"the kernels need compute capability 8.0, {name} has {properties.major}.{properties.minor}"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    return DeviceFacts("cuda", name, capability, properties.multi_processor_count, reason)
