"""The data files of ``configs/``: inside the package when installed, beside it in a checkout."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

_PLACES = (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")


@cache
def read_preset(name: str) -> dict[str, Any]:
    """The content of ``configs/<name>.json``. Raises FileNotFoundError when the installation is incomplete."""
    for place in _PLACES:
        if (place / f"{name}.json").is_file():
            return dict(json.loads((place / f"{name}.json").read_text(encoding="utf-8")))
    raise FileNotFoundError(
        f"configs/{name}.json is missing from this installation of ciuic-hf; install it again."
    )
