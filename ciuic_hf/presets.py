"""The data files of ``configs/``."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from ciuic_hf.errors import CiuicError
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


def card_nbytes(name: str) -> int:
    """Bytes of a card of ``configs/cards.json`` that a program can use. Raises CiuicError for another name."""
    preset = read_preset("cards")
    cards = {key.lower(): card for key, card in preset["cards"].items()}
    if name.lower() not in cards:
        known = ", ".join(preset["cards"])
        raise CiuicError(f'No card is named {name!r}; choose one of {known}, or say --memory "22GiB".')
    return int(cards[name.lower()]["mib"] - preset["reserved_mib"]) << 20
