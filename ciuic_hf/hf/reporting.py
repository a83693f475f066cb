"""The report of a transformers model, and loads that print none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.modules.reporting import report_of
from ciuic_hf.report import Report


def build_report(model: Any, config: CiuicConfig, errors: Mapping[str, float] | None = None) -> Report:
    """What every parameter of a loaded model became. Tied parameters are counted once; ``errors`` as in report_of."""
    roles = {name: entry["role"] for name, entry in config.parameters.items()}
    source = model.config.name_or_path or type(model).__name__
    return report_of(model, roles, config.kept, set(model.all_tied_weights_keys), source, errors)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and the table of a load."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
