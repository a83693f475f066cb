"""Which checkpoints are of models that write text; the commands work on no others."""

from __future__ import annotations

from typing import Any

from ciuic_hf.errors import CiuicError

_PARTS = ("ForCausalLM", "LMHead", "ForConditionalGeneration")  # of the names of their classes


def refusal(name: str, config: Any) -> CiuicError | None:
    """What to raise for a checkpoint of another kind, an encoder or a classifier; None where its name allows text.

    Args:
        name: of the checkpoint, as the user wrote it.
        config: of transformers.
    """
    from transformers import AutoModelForCausalLM

    classes = config.architectures or [type(config).__name__]
    known = type(config) in AutoModelForCausalLM._model_mapping
    if known and (not config.architectures or any(part in cls for cls in classes for part in _PARTS)):
        return None
    return CiuicError(
        f"{name} is a {classes[0]}, and this command is for models that write text from left to right; compress it "
        "while loading: from_pretrained(..., quantization_config=CiuicConfig(bits=...)) of its own class."
    )
