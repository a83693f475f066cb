"""``CiuicConfig``: what ``from_pretrained(quantization_config=...)`` takes and ``config.json`` keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ciuic_hf.config import CompressionIntent, Setting
from ciuic_hf.errors import CiuicError
from ciuic_kernels import FORMAT_VERSION

METHOD = "ciuic"


@register_quantization_config(METHOD)
class CiuicConfig(QuantizationConfigMixin):
    """Compress a model while it loads.

    Args:
        bits: bits per weight of every Linear and expert, everything stored counted, 1 to 16, fractions allowed.
            Below 2.13 whole blocks are dropped; 16 leaves the weights as they are.
        modules: exceptions, role or name pattern -> bits, codec name, or ``"raw"``. Roles: embeddings, lm_head,
            attention, mlp, shared_experts, experts, linear. The most specific wins. Embeddings and lm_head are
            at 8 bits unless told.

    Example:
        ``CiuicConfig(bits=4.25, modules={"embeddings": 8, "attention": 6, "model.layers.0.": 8})``

    Raises:
        CiuicError: for an unknown key or a value out of range.
    """

    def __init__(
        self,
        bits: float = 4.25,
        modules: Mapping[str, Setting] | None = None,
        quant_method: str = METHOD,
        format_version: int = FORMAT_VERSION,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        kept: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CiuicError(
                f"CiuicConfig has no option {', '.join(sorted(unknown))}; it takes bits and modules."
            )
        if quant_method != METHOD:
            raise CiuicError(f"quant_method of a CiuicConfig is {METHOD!r}, got {quant_method!r}.")
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise CiuicError(
                f"This checkpoint has format version {format_version}, this ciuic_hf reads up to {FORMAT_VERSION}; "
                "upgrade ciuic-hf."
            )
        intent = CompressionIntent(bits, modules or {})
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits = intent.bits
        self.modules = dict(intent.modules)
        self.parameters = {name: dict(entry) for name, entry in (parameters or {}).items()}
        self.kept = dict(kept or {})
        self.source_quantization: dict[str, Any] | None = None

    @property
    def intent(self) -> CompressionIntent:
        return CompressionIntent(self.bits, self.modules)

    @property
    def is_compressed(self) -> bool:
        """Whether this config came out of a compressed checkpoint."""
        return bool(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` keeps: intent and, for a compressed model, every parameter's shape and size."""
        saved = {
            key: copy.deepcopy(value) for key, value in vars(self).items() if key != "source_quantization"
        }
        return {key: value for key, value in saved.items() if value not in ({}, None) or key == "modules"}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
