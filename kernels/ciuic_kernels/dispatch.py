"""Which implementation runs an operator: a pure function of the device, with one switch.

``CIUIC_IMPL=reference`` forces the torch reference everywhere; there is no other switch.
"""

from __future__ import annotations

import os
import warnings

import torch

from ciuic_kernels.cpu import native

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with this sentence the first time only."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def use_native(device: torch.device) -> bool:
    """Whether the compiled CPU kernels serve this device; says once why they do not."""
    if device.type != "cpu" or os.environ.get("CIUIC_IMPL") == "reference":
        return False
    if not native.available():
        say_once(f"Ciuic runs its slow torch reference on this CPU: {native.unavailable_reason()}.")
        return False
    return True
