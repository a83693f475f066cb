"""The report of a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ciuic_hf.hf.config import CiuicConfig
from ciuic_hf.modules.reporting import report_of
from ciuic_hf.report import Report


def build_report(model: Any, config: CiuicConfig, errors: Mapping[str, float] | None = None) -> Report:
    """What every parameter of a loaded model became. Tied parameters are counted once; ``errors`` as in report_of."""
    roles = {name: entry["role"] for name, entry in config.parameters.items()}
    source = model.config.name_or_path or type(model).__name__
    return report_of(model, roles, config.kept, set(model.all_tied_weights_keys), source, errors)
