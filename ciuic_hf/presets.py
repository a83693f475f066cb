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


def card_named(name: str) -> str:
    """The name as ``configs/cards.json`` writes it. Raises CiuicError for one that is not there."""
    cards = {key.lower(): key for key in read_preset("cards")["cards"]}
    if name.lower() not in cards:
        known = ", ".join(read_preset("cards")["cards"])
        raise CiuicError(f'No card is named {name!r}; choose one of {known}, or say --memory "22GiB".')
    return cards[name.lower()]


def card_nbytes(name: str) -> int:
    """Bytes of a card that a model may take. Raises CiuicError for an unknown one."""
    preset = read_preset("cards")
    return int(preset["cards"][card_named(name)]["mib"] - preset["reserved_mib"]) << 20
