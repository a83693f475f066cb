"""The releases of Triton that the gate compiles with, fetched beside the installed one when they are asked for."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tests.triton.measurement import CACHE

FIRST, PINNED, LAST = "3.6", "3.7", "3.8"
RELEASES = {FIRST: "3.6.0", PINNED: "3.7.1", LAST: "3.8.0"}
"""The lowest that pyproject.toml allows, the one of constraints.txt, the one of the newest allowed torch (2.14)."""


def installed() -> str:
    """Minor version of the installed Triton; empty without one."""
    try:
        return ".".join(version("triton").split(".")[:2])
    except PackageNotFoundError:
        return ""


def location(minor: str) -> Path | None:
    """Where that Triton is, downloaded if need be; None for the installed one.

    Raises:
        RuntimeError: it could not be downloaded.
    """
    if version("triton") == RELEASES[minor]:
        return None
    folder = CACHE / f"triton-{RELEASES[minor]}"
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="triton-", dir=CACHE))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*pip, "--target", str(fresh), f"triton=={RELEASES[minor]}"], capture_output=True, text=True
        )
        if done.returncode:
            shutil.rmtree(fresh)
            raise RuntimeError(f"Triton {RELEASES[minor]} could not be downloaded:\n{done.stderr[-1000:]}")
        fresh.rename(folder)  # only a complete copy gets the name
    return folder
