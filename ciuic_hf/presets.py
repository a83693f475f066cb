"""The data files of ``configs/``."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from ciuic_hf.packaged import configs_folder


@cache
def read_preset(name: str) -> dict[str, Any]:
    """The content of ``configs/<name>.json``. Raises FileNotFoundError when the installation is incomplete."""
    path = configs_folder() / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"configs/{name}.json is missing from this installation of ciuic-hf; install it again."
        )
    return dict(json.loads(path.read_text(encoding="utf-8")))
