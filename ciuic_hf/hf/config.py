"""``CiuicConfig``: what ``from_pretrained(quantization_config=...)`` takes and ``config.json`` keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ciuic_hf.config import ADAPTIVE, CompressionIntent, Setting, check_policy
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.devices import device_key
from ciuic_hf.planning.cache_formats import check_cache_bits
from ciuic_hf.planning.memory import parse_size
from ciuic_hf.planning.prefill_chunk import AUTO as AUTO_CHUNK
from ciuic_hf.planning.prefill_chunk import check_prefill_chunk
from ciuic_kernels import FORMAT_VERSION

METHOD = "ciuic"
AUTO = "auto"
_RUNTIME = (
    "source_quantization",
    "sensitivity",
    "calibration",
    "plan",
    "memory",
    "context",
    "batch",
    "replaced_prefill_chunk",
)  # of one load; not kept in config.json


class _Default(float):
    """A number of bits that nobody asked for."""


DEFAULT_BITS = _Default(4.25)


def _check_budget(asked_bits: bool, policy: object, plan: object, memory: object, context: object) -> None:
    """Raise CiuicError for settings that contradict each other."""
    if asked_bits and memory is not None:
        raise CiuicError("bits and memory both say how large the model becomes; give one of them.")
    if plan is not None and (asked_bits or memory is not None):
        raise CiuicError("A plan holds every size already; leave out bits and memory.")
    if memory is not None and context is None:
        raise CiuicError("memory has to hold the cache too; say for how many tokens, such as context=32768.")
    if context is not None and memory is None:
        raise CiuicError(
            "context and batch belong to memory, which is not given; use bits alone or add memory."
        )
    if policy == "uniform" and (memory is not None or plan is not None):
        raise CiuicError('policy="uniform" goes by bits alone; leave it out to use memory or a plan.')
    if policy == ADAPTIVE and (asked_bits or memory is not None or plan is not None):
        raise CiuicError(
            'policy="adaptive" goes by the weights alone; leave it out to use bits, memory or a plan.'
        )


def _parse_memory(memory: Any) -> int | str | dict[int | str, int] | None:
    """Bytes, bytes by device, ``"auto"`` or None. Raises CiuicError."""
    if memory is None or memory == AUTO:
        return memory
    if not isinstance(memory, Mapping):
        return parse_size(memory)
    if not memory:
        raise CiuicError('memory={} names no device; give sizes such as {0: "22GiB", 1: "22GiB"}.')
    return {device_key(device): parse_size(size) for device, size in memory.items()}


@register_quantization_config(METHOD)
class CiuicConfig(QuantizationConfigMixin):
    """Compress a model while it loads.

    Args:
        bits: bits per weight of every Linear and expert, everything stored counted, 1 to 16, fractions allowed.
            About 2.13 is the least; with ``policy="uniform"`` whole blocks are dropped below. 16 leaves the
            weights as they are.
        modules: exceptions, role or name pattern -> bits, codec name, or ``"raw"``. Roles: embeddings, lm_head,
            attention, mlp, shared_experts, experts, linear. The most specific wins. Embeddings and lm_head are
            at 8 bits unless told.
        policy: ``"rate-distortion"`` gives more bits to the blocks that matter more; all weights with the same
            setting take ``bits`` together. ``"uniform"`` gives each matrix the same. ``"adaptive"`` takes no bits:
            8 everywhere, fewer for blocks with few weights and none for blocks of zeros.
        sensitivity: file that ``ciuic calibrate`` wrote: how much each block matters. Without it the
            rate-distortion policy goes by the kind of each weight (``configs/sensitivity.json``).
        calibration: file that ``ciuic calibrate --rounding`` wrote: codes are chosen for the inputs that the weights
            will meet, with the same bytes. It serves as ``sensitivity`` as well where that applies.
        plan: file that ``ciuic plan`` wrote, followed exactly: the codec of every block.
        memory: instead of bits: what the model may take while it generates, such as ``"22GiB"``, everything
            counted that :mod:`ciuic_hf.planning.memory` lists. Bits are chosen to fill it. ``"auto"`` is what the
            device has free. ``{0: "22GiB", 1: "46GiB"}`` is for each device of an explicit ``device_map``.
        context, batch: with memory: tokens of a sequence, and how many sequences at once.
        cache_bits: 8, 4, 3 or 2: ``generate`` compresses keys and values (``CiuicCache``), and ``memory`` counts it.
        prefill_chunk: tokens of a prompt that go through the model together, ``generate`` feeds longer ones in pieces;
            ``"none"`` for all at once. Unless given, chosen with ``memory`` (``"auto"``) and not set with ``bits``.

    Example:
        ``CiuicConfig(bits=4.25, modules={"embeddings": 8, "attention": 6, "model.layers.0.": 8})``

    Raises:
        CiuicError: for an unknown key or a value out of range.
    """

    def __init__(
        self,
        bits: float = DEFAULT_BITS,
        modules: Mapping[str, Setting] | None = None,
        policy: str | None = None,
        sensitivity: str | Path | None = None,
        calibration: str | Path | None = None,
        plan: str | Path | None = None,
        memory: str | int | Mapping[int | str, str | int] | None = None,
        context: int | None = None,
        batch: int = 1,
        cache_bits: int | None = None,
        prefill_chunk: int | str | None = None,
        quant_method: str = METHOD,
        format_version: int = FORMAT_VERSION,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        kept: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise CiuicError(
                f"CiuicConfig has no option {', '.join(sorted(unknown))}; it takes bits, modules, policy, "
                "sensitivity, calibration, plan, memory, context, batch, cache_bits and prefill_chunk."
            )
        if quant_method != METHOD:
            raise CiuicError(f"quant_method of a CiuicConfig is {METHOD!r}, got {quant_method!r}.")
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise CiuicError(
                f"This checkpoint has format version {format_version}, this ciuic_hf reads up to {FORMAT_VERSION}; "
                "upgrade ciuic-hf."
            )
        _check_budget(bits is not DEFAULT_BITS and not parameters, policy, plan, memory, context)
        intent = CompressionIntent(bits, modules or {})
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits = intent.bits
        self.modules = dict(intent.modules)
        self.policy = check_policy(policy or "rate-distortion")
        if sensitivity is not None and self.policy != "rate-distortion":
            raise CiuicError(f'sensitivity is for policy="rate-distortion", got policy={policy!r} with it.')
        self.sensitivity = str(sensitivity) if sensitivity is not None else None
        self.calibration = str(calibration) if calibration is not None else None
        self.plan = str(plan) if plan is not None else None
        self.memory = _parse_memory(memory)
        self.context, self.batch = context, batch
        self.cache_bits = None if cache_bits is None else check_cache_bits(cache_bits)
        self.prefill_chunk = None if prefill_chunk is None else check_prefill_chunk(prefill_chunk)
        if self.prefill_chunk == AUTO_CHUNK and memory is None:
            raise CiuicError('prefill_chunk="auto" is chosen for a memory; give one, or a number of tokens.')
        self.replaced_prefill_chunk: int | str | None = None  # of the file, where another is given for a load
        self.parameters = {name: dict(entry) for name, entry in (parameters or {}).items()}
        self.kept = dict(kept or {})
        self.source_quantization: dict[str, Any] | None = None

    def memory_of(self, device: int | str) -> int:
        """Bytes that a device may take. Raises CiuicError when memory is given by device and this one has none."""
        if not isinstance(self.memory, dict):
            assert isinstance(self.memory, int)
            return self.memory
        if device not in self.memory:
            raise CiuicError(
                f"memory says nothing of device {device!r}, which device_map uses; add its size."
            )
        return self.memory[device]

    @property
    def intent(self) -> CompressionIntent:
        adaptive = {"linear": ADAPTIVE, "experts": ADAPTIVE} if self.policy == ADAPTIVE else {}
        return CompressionIntent(self.bits, adaptive | self.modules)

    @property
    def is_compressed(self) -> bool:
        """Whether this config came out of a compressed checkpoint."""
        return bool(self.parameters)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` keeps: intent and, for a compressed model, every parameter's shape and size."""
        saved = {key: copy.deepcopy(value) for key, value in vars(self).items() if key not in _RUNTIME}
        return {key: value for key, value in saved.items() if value not in ({}, None) or key == "modules"}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
