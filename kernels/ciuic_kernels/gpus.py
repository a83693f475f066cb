"""Facts of GPUs by a short name, so that the choice of kernels can be shown for one that is not here.

Names are those that the driver reports. ``ciuic inspect --dispatch --gpu H100`` reads this table; kernels never do.
"""

from __future__ import annotations

from ciuic_kernels.device import DeviceFacts

GPUS = {
    "A100": DeviceFacts("cuda", "NVIDIA A100-SXM4-80GB", 80, 108),
    "H100": DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 90, 132),
    "H200": DeviceFacts("cuda", "NVIDIA H200", 90, 132),
    "L40S": DeviceFacts("cuda", "NVIDIA L40S", 89, 142),
    "RTX4090": DeviceFacts("cuda", "NVIDIA GeForce RTX 4090", 89, 128),
    "B200": DeviceFacts("cuda", "NVIDIA B200", 100, 148),
}


def gpu_by_name(name: str) -> DeviceFacts:
    """The facts of a GPU, spelled with or without spaces. Raises ValueError with the list of names."""
    known = GPUS.get(name.upper().replace(" ", "").replace("-", ""))
    if known is None:
        raise ValueError(f"No GPU is named {name!r} here; choose one of {', '.join(GPUS)}.")
    return known
