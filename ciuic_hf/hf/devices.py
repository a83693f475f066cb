"""The device that a load puts a model on, and what it has free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ciuic_hf.errors import CiuicError
from ciuic_hf.memory_calculator import device_memory
from ciuic_hf.report import human_bytes

CPU_SHARE = 0.9
"""Of the memory that is available: other programs live there too, and a system without any stops."""


def device_key(device: Any) -> int | str:
    """``1``, ``"cuda:1"`` or ``torch.device("cuda", 1)`` -> ``1``; ``"cpu"`` and ``"disk"`` stay."""
    name = str(device)
    if isinstance(device, int) or name.isdecimal():
        return int(device)
    kind, _, index = name.partition(":")
    if kind == "cuda":
        return int(index or 0)
    return kind


def device_type(device_map: Any) -> str:
    """``"cpu"`` or ``"cuda"``: where most of a model will compute."""
    if device_map is None or device_map == "cpu":
        return "cpu"
    if isinstance(device_map, Mapping):
        return "cpu" if all(device_key(d) in ("cpu", "disk") for d in device_map.values()) else "cuda"
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device_key(device_map) == "cpu" else "cuda"


def free_nbytes(device_map: Any) -> int:
    """What ``memory="auto"`` stands for: the free memory of the one device that a load will use.

    On a GPU all that torch could still allocate, on a CPU 0.9 of what is available.

    Raises:
        CiuicError: when the model may be spread over several devices.
    """
    device = _single_device(device_map)
    if device is None:
        raise CiuicError(
            f'memory="auto" is for one device and device_map={device_map!r} may use several; name one, such as '
            'device_map="cuda:0", or give memory={0: "22GiB", ...} with an explicit device_map.'
        )
    free = device_memory(device)[1]
    return int(CPU_SHARE * free) if device.type == "cpu" else free


def _single_device(device_map: Any) -> torch.device | None:
    if device_map is None:
        return torch.device("cpu")
    if isinstance(device_map, Mapping):
        keys = {device_key(device) for device in device_map.values()}
        if len(keys) != 1 or keys == {"disk"}:
            return None
        return _as_device(keys.pop())
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        count = torch.cuda.device_count()
        return None if count > 1 else torch.device("cuda", 0) if count else torch.device("cpu")
    return _as_device(device_key(device_map))


def _as_device(key: int | str) -> torch.device:
    return torch.device("cuda", key) if isinstance(key, int) else torch.device(key)


def explicit_map(device_map: Any) -> dict[str, int | str]:
    """The device of each module name, as :func:`device_key` writes them. Raises CiuicError for ``"auto"`` and such."""
    if not isinstance(device_map, Mapping):
        raise CiuicError(
            f"memory by device needs to know which module goes where, got device_map={device_map!r}; give a "
            "dictionary, such as the one that `ciuic plan MODEL --count N --json` prints."
        )
    return {name: device_key(device) for name, device in device_map.items()}


ACCELERATE_SHARE = 0.88
"""accelerate plans with 0.9 of a device's free memory where no max_memory is given, looked up a moment later."""


def check_max_memory(max_memory: Mapping[int | str, int], memory: int, weights: int) -> None:
    """Refuse a load that accelerate would spread otherwise than its bits were chosen for.

    transformers looks at ``max_memory`` after bits were chosen, and says nothing of it before.

    Args:
        max_memory: bytes that accelerate will plan with, of accelerators and ``"cpu"``.
        memory: bytes that the bits were chosen for, of one device.
        weights: bytes of the weights in that.

    Raises:
        CiuicError: where less than ``memory`` is there on one device, or too little for the weights on several.
    """
    accelerators = {key: n for key, n in max_memory.items() if key not in ("cpu", "disk") and n > 0}
    there = accelerators or {"cpu": max_memory.get("cpu", 0)}
    room = sum(there.values())
    enough = weights if len(there) > 1 else max(weights, int(ACCELERATE_SHARE * memory))
    if room < enough:
        devices = ", ".join(map(str, there))
        raise CiuicError(
            f"Bits were chosen for memory={human_bytes(memory)} before transformers looks at max_memory, which leaves "
            f"{human_bytes(room)} on device {devices}: give that size as memory, or a memory for each device with a "
            "device_map, such as the one that `ciuic plan MODEL --count N --json` prints."
        )
