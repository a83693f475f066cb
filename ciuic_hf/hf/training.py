"""``prepare_for_training``: a compressed model made ready for adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ciuic_hf.errors import CiuicError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def prepare_for_training(
    model: AnyModule,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> AnyModule:
    """Freeze a model and turn on gradient checkpointing, before adapters are added to it.

    Nothing is cast: norms compute in float32 by themselves, and what is kept uncompressed stays in the model's dtype.
    With reentrant checkpointing the embeddings' output gets ``requires_grad``, else no gradient would reach the
    adapters of a checkpointed layer. ``peft.prepare_model_for_kbit_training`` does the same for compressed models.

    Args:
        model: a transformers model, compressed or not; changed in place.
        gradient_checkpointing: False leaves activations to be kept, for models whose activations fit.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint``; ``{"use_reentrant": False}`` unless given.

    Raises:
        CiuicError: when a model that cannot checkpoint is asked to.
    """
    model.requires_grad_(False)
    if not gradient_checkpointing:
        return model
    renamed = getattr(
        model, "activation_checkpointing_enable", None
    )  # transformers 5.23; before, the other name
    enable = renamed or getattr(model, "gradient_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise CiuicError(
            f"{type(model).__name__} has no gradient checkpointing; call prepare_for_training(model, False)."
        )
    options = {"use_reentrant": False} | dict(gradient_checkpointing_kwargs or {})
    if options["use_reentrant"]:
        model.enable_input_require_grads()  # type: ignore[operator]
    enable(options)
    return model
