"""Which adapters compressed weights can carry; the others are refused before anything is wrapped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.experts import CiuicExperts
from ciuic_hf.modules.swap import compressed_modules

LORA = "LORA"
FORWARD_ONLY = (
    "ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "LN_TUNING", "MISS", "OFT", "PVERA",
    "RANDLORA", "ROAD", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""Methods that work on inputs and outputs and never look at a weight: they train, and cannot be merged."""

_INITS = (True, False, "gaussian")
_VARIANTS = {
    "use_dora": "DoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_qalora": "QALoRA",
}


def check_config(config: Any, model: nn.Module) -> None:
    """Raise CiuicError for an adapter that compressed weights cannot carry."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method != LORA and method not in FORWARD_ONLY:
        raise CiuicError(
            f"{method} adapters need full weights, or were not proven on compressed ones; use LoRA or one of "
            f"{', '.join(FORWARD_ONLY)}, or load the model without CiuicConfig."
        )
    packed = dict(compressed_modules(model))
    _check_trained_whole(config, packed)
    if getattr(config, "init_weights", None) == "bat":
        raise CiuicError('init_weights="bat" computes with the full weight; leave it at its default.')
    if method in (LORA, "ADALORA"):
        _check_lora(config)
        _check_parameters(getattr(config, "target_parameters", None) or (), packed)


def _check_lora(config: Any) -> None:
    if config.init_lora_weights not in _INITS:
        raise CiuicError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the full weight or its dtype, which a "
            'compressed model does not have; use True, False or "gaussian".'
        )
    for option, name in _VARIANTS.items():
        if getattr(config, option, None):
            raise CiuicError(
                f"{name} ({option}) does not work on compressed weights; use plain LoRA, use_rslora=True included."
            )


def _check_trained_whole(config: Any, packed: Mapping[str, nn.Module]) -> None:
    """PEFT trains a copy of these modules, or rows of them; of a compressed one there are only bytes."""
    for name in _compressed_among(getattr(config, "modules_to_save", None) or (), packed):
        raise CiuicError(
            f"modules_to_save names {name}, whose weight is compressed and cannot be trained; put it into "
            f'target_modules, or load the model with modules={{"{name}": "raw"}}.'
        )
    tokens = getattr(config, "trainable_token_indices", None)
    tables = tokens if isinstance(tokens, dict) else ["embed_tokens"] if tokens else ()
    for name in _compressed_among(tables, packed):
        raise CiuicError(
            f"trainable_token_indices trains rows of {name}, which is compressed; load the model with "
            'modules={"embeddings": "raw"}.'
        )


def _compressed_among(names: Iterable[str], packed: Mapping[str, nn.Module]) -> Iterable[str]:
    return [full for name in names for full in packed if full == name or full.endswith(f".{name}")]


def _check_parameters(targets: Iterable[str], packed: Mapping[str, nn.Module]) -> None:
    for target in targets:
        for name, module in packed.items():
            owns = f"{name}.{target.rpartition('.')[2]}"
            if not (owns == target or owns.endswith(f".{target}")) or isinstance(module, CiuicExperts):
                continue
            if target.rpartition(".")[2] in dict(module.named_parameters(recurse=False)):
                raise CiuicError(
                    f"target_parameters names {target}, the weight of a compressed {type(module).__name__}; name the "
                    f"module in target_modules instead, {name.rpartition('.')[2]!r}."
                )
