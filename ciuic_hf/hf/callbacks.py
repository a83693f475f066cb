"""Callbacks for transformers' Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ciuic_hf.runtime.activations import ActivationCompression, compress_activations


class ActivationCompressionCallback(TrainerCallback):
    """``compress_activations`` on the model that a Trainer trains, from the beginning to the end of training.

        Trainer(model, args, train_dataset=data, callbacks=[ActivationCompressionCallback(bits=4)])

    Takes what ``compress_activations`` takes. A loss that is computed outside of the model's forward (label
    smoothing, ``compute_loss_func``) saves its own activations uncompressed.

    Attributes:
        compression: counts of the training that runs or ran last, None before.
    """

    def __init__(self, bits: int = 4, *, min_numel: int = 1024, seed: int = 0) -> None:
        compress_activations(
            bits=bits, min_numel=min_numel, seed=seed
        )  # refuses now what it would refuse later
        self._settings = {"bits": bits, "min_numel": min_numel, "seed": seed}
        self.compression: ActivationCompression | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.compression is not None:  # of a training that an exception ended
            self.compression.remove()
        self.compression = compress_activations(model, **self._settings)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.compression is not None:
            self.compression.remove()
