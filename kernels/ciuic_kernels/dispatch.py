"""Which implementation serves a device, with one switch.

``CIUIC_IMPL=reference`` forces the torch reference everywhere; there is no other switch.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

import torch

from ciuic_kernels.attention import AttentionChoice, AttentionShape, choose_attention
from ciuic_kernels.cpu import native
from ciuic_kernels.device import device_facts
from ciuic_kernels.selection import Choice, choose
from ciuic_kernels.tuning import rules_for, triton_minor

_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn with this sentence the first time only."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)


def forced_reference() -> bool:
    """Whether the user asks for the torch reference."""
    return os.environ.get("CIUIC_IMPL") == "reference"


def use_native(device: torch.device) -> bool:
    """Whether the compiled CPU kernels serve this device; says once why they do not."""
    if device.type != "cpu" or forced_reference():
        return False
    if not native.available():
        say_once(f"Ciuic runs its slow torch reference on this CPU: {native.unavailable_reason()}.")
        return False
    return True


def use_triton(device: torch.device) -> bool:
    """Whether the Triton kernels serve this device; says once why they do not, unless it is a CPU."""
    if forced_reference():
        return False
    reason = device_facts(device).reason
    if reason and device.type not in ("cpu", "meta"):
        say_once(f"Ciuic runs its slow torch reference on {device.type}: {reason}.")
    return not reason


@lru_cache(maxsize=4096)
def _choice(op: str, tokens: int, weights: int, dtype: torch.dtype, device: torch.device) -> Choice:
    facts = device_facts(device)
    return choose(op, tokens, weights, dtype, facts, rules_for(facts.name, triton_minor()))


def product_choice(op: str, tokens: int, weights: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """What ``choose`` says for a device that ``use_triton`` accepts, with the tables of this machine."""
    return _choice(op, tokens, weights, dtype, device)


def attention_choice(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> AttentionChoice:
    """What ``choose_attention`` says for a device."""
    if forced_reference():
        return AttentionChoice("tiles", None, "CIUIC_IMPL=reference")
    return choose_attention(shape, dtype, device_facts(device))
