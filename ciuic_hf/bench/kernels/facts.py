"""What a GPU is called and what runs on it: the lines that numbers are worth nothing without."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ciuic_kernels.device import device_facts

QUERIES = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "max_sm_clock_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}


@dataclass(frozen=True)
class Machine:
    """A GPU with its software.

    Attributes:
        capability: compute capability times ten.
        smi: what nvidia-smi says at the start (``QUERIES``); empty without it.
    """

    gpu: str
    capability: int
    processors: int
    memory_nbytes: int
    l2_nbytes: int
    torch: str
    cuda: str
    triton: str
    transformers: str
    smi: dict[str, str]

    @property
    def slug(self) -> str:
        """The GPU's name as part of a file name: ``nvidia-h100-80gb-hbm3``."""
        return slug(self.gpu)

    def __str__(self) -> str:
        software = (
            f"torch {self.torch} (CUDA {self.cuda}), triton {self.triton}, transformers {self.transformers}"
        )
        clocks = (
            ", ".join(f"{name} {value}" for name, value in self.smi.items()) or "nvidia-smi not available"
        )
        return f"{self.gpu}, {self.memory_nbytes / 2**30:.0f} GiB\n{software}\n{clocks}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def slug(name: str) -> str:
    """Lower case, with everything that is no letter or digit as a dash."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machine_of(device: torch.device) -> Machine:
    """The facts of a CUDA device."""
    properties, facts = torch.cuda.get_device_properties(device), device_facts(device)
    return Machine(
        gpu=facts.name,
        capability=facts.capability,
        processors=facts.processors,
        memory_nbytes=properties.total_memory,
        l2_nbytes=properties.L2_cache_size,
        torch=str(torch.__version__),
        cuda=torch.version.cuda or "none",
        triton=_version("triton"),
        transformers=_version("transformers"),
        smi=_ask_smi(f"GPU-{properties.uuid}"),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _ask_smi(uuid: str) -> dict[str, str]:
    """Driver, clocks, power and temperature of one GPU; nothing is set."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([*command, "-i", uuid], capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return {}
    return parse_smi(done.stdout) if done.returncode == 0 else {}


def parse_smi(line: str) -> dict[str, str]:
    """One line of nvidia-smi's CSV by the keys of ``QUERIES``."""
    values = [value.strip() for value in line.strip().splitlines()[0].split(",")] if line.strip() else []
    return dict(zip(QUERIES, values, strict=True)) if len(values) == len(QUERIES) else {}
