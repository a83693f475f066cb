"""Where the data is that ships with the package."""

from __future__ import annotations

from pathlib import Path


def configs_folder() -> Path:
    """``ciuic_hf/configs`` of an installed wheel, ``configs`` beside the package in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"
