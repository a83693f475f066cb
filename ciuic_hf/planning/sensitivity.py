"""How much the output of a model changes when a block of its weights does.

The *sensitivity* of a block is the KL divergence, in nats per token, that a relative squared error of 1 in it would
cost if the model were quadratic: ``KL ~ sum over blocks of sensitivity * |W - Q|^2 / |W|^2``. With the Fisher
diagonal F of the weights (the mean of the squared gradient of the log-likelihood of a label that the model draws
itself), a change d costs ``1/2 sum F d^2`` in second order (Amari, Natural gradient works efficiently in learning,
1998), so that the sensitivity of a block is ``1/2 * sum(F) * mean(W^2)``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.moments import INPUTS, PREFIX, SHARES, InputMoments, Moments
from ciuic_kernels import BlockGrid

FILE_VERSION = 1
_KIND = "ciuic-sensitivity"


@dataclass(frozen=True)
class Sensitivity:
    """Measured sensitivities of one model.

    Attributes:
        blocks: parameter name -> float32 ``[strips, kblocks]`` or ``[E, strips, kblocks]``, all positive.
        source: what the tokens were, such as ``"text of the model's own"``.
        tokens: how many.
    """

    blocks: Mapping[str, Tensor]
    source: str
    tokens: int

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CiuicError unless there is a sensitivity for every block of these parameters.

        Args:
            shapes: parameter name -> ``(N, K)`` or ``(E, N, K)``.
        """
        for name, shape in shapes.items():
            found = self.blocks.get(name)
            wanted = BlockGrid(shape).tags_shape[:-1]
            if found is None or tuple(found.shape) != wanted:
                has = "nothing" if found is None else f"{list(found.shape)} blocks"
                raise CiuicError(
                    f"These sensitivities were measured on another model: this one has {name} {list(shape)}, which "
                    f"is {list(wanted)} blocks, and they have {has} for it; run `ciuic calibrate` on this model."
                )

    def rounded(self, moments: InputMoments) -> Sensitivity:
        """What is left of them when codes are chosen by these moments."""
        return replace(self, blocks={name: _rounded(name, b, moments) for name, b in self.blocks.items()})

    def save(self, path: Path, moments: Moments | None = None) -> None:
        """Write a safetensors file with a JSON description in its metadata.

        Args:
            moments: of inputs, to keep in the same file, as :mod:`ciuic_hf.planning.moments` reads them.
        """
        about = {"source": self.source, "tokens": self.tokens, "version": FILE_VERSION}
        metadata = {_KIND: json.dumps(about)}
        tensors = {name: values.contiguous() for name, values in self.blocks.items()}
        if moments is not None:
            metadata[INPUTS] = json.dumps(moments.inputs)
            tensors |= {PREFIX + name: factor for name, factor in moments.factors.items()}
            tensors |= {SHARES + name: share for name, share in moments.shares.items()}
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read what :meth:`save` wrote. Raises CiuicError for anything else."""
        if not Path(path).is_file():
            raise CiuicError(
                f"There is no file {path}; `ciuic calibrate MODEL --save {path}` makes one for "
                "sensitivity, with --rounding for calibration too."
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = (file.metadata() or {}).get(_KIND)
                names = [name for name in file.keys() if not name.startswith((PREFIX, SHARES))]  # noqa: SIM118
                blocks = {name: file.get_tensor(name) for name in names} if about else {}
        except SafetensorError:
            about = None
        if about is None:
            raise CiuicError(
                f"{path} holds no sensitivities; `ciuic calibrate MODEL --save FILE` makes such a file."
            )
        described = json.loads(about)
        if described["version"] > FILE_VERSION:
            raise CiuicError(
                f"{path} has version {described['version']}, this ciuic_hf reads up to {FILE_VERSION}; "
                "upgrade ciuic-hf."
            )
        for name, values in blocks.items():
            if values.dtype != torch.float32 or not bool(((values > 0) & values.isfinite()).all()):
                raise CiuicError(f"{path}: the sensitivities of {name} must be positive float32 numbers.")
        return cls(blocks, described["source"], described["tokens"])


def _rounded(name: str, blocks: Tensor, moments: InputMoments) -> Tensor:
    """Sensitivities ``[..., strips, kblocks]`` times the shares of the inputs of each matrix."""
    found = blocks.clone()
    for index, matrix in enumerate(found if blocks.dim() == 3 else [found]):
        share = moments.share(name, index)
        if share is not None:
            matrix *= share
    return found
