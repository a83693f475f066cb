"""The demo model: a small DeepSeek-V3 language model of public-domain English, and how it was made."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def bf16_path() -> Path:
    """The directory of the published model in bf16, in the official DeepSeek-V3 file format."""
    return _HERE / "models" / "bf16"


def fp8_path() -> Path:
    """The directory of the same model in FP8 (e4m3 with one scale per 128 x 128 block)."""
    return _HERE / "models" / "fp8"


def heldout_text() -> str:
    """The books kept out of training, about 74 KB: one verse a line, one empty line between chapters."""
    return (_HERE / "heldout.txt").read_text(encoding="utf-8")
