"""``ciuic plan --train lora``: what a training step on a compressed model takes, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ciuic_hf.hf.planner import Outlook, Request
from ciuic_hf.hf.source import Source
from ciuic_hf.planning.adapters import Adapters, Layout
from ciuic_hf.planning.memory import Run, Sizes, largest
from ciuic_hf.planning.training import Recipe, TrainingFootprint, training_footprint
from ciuic_hf.runtime.packing import stored_nbytes


@dataclass(frozen=True)
class TrainingRequest:
    """What a plan is asked for.

    Attributes:
        length: tokens of a sequence.
        memory: bytes of the device, None when only sizes are asked for.
        card: its name in ``configs/cards.json``.
        bits: of the compressed weights.
    """

    length: int
    batch: int
    targets: tuple[str, ...] = ("attention",)
    rank: int = 16
    dropout: float = 0.0
    bits: float = 4.25
    memory: int | None = None
    card: str | None = None
    device: str = "cuda"
    activation_bits: int | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"


class TrainingOutlook:
    """A training plan for a model. Raises CiuicError for a request that does not fit the model."""

    def __init__(self, source: Source, model: Any, request: TrainingRequest) -> None:
        self.source, self.request = source, request
        text = model.config.get_text_config().to_dict()
        self.limit: int | None = text.get("max_position_embeddings")
        layout = Layout.of(Sizes(text))
        adapters = Adapters.of(layout, request.targets, request.rank, request.dropout > 0)
        element, device = model.dtype.itemsize, request.device
        eager = model.config._attn_implementation == "eager"
        self.recipe = Recipe(
            adapters,
            Run(element, None, device, "eager" if eager else None),
            stored_nbytes,
            request.activation_bits,
            request.checkpointing,
            request.optimizer,
        )
        self.footprint(self.recipe)  # refuses lengths and batches before codecs are chosen
        self.weights = Outlook(
            source, model, Request(request.length, request.batch, bits=request.bits, device=device)
        )

    def footprint(
        self, recipe: Recipe, length: int | None = None, batch: int | None = None
    ) -> TrainingFootprint:
        """At the asked sizes, where no others are given."""
        length = self.request.length if length is None else length
        return training_footprint(recipe, length, self.request.batch if batch is None else batch)

    def weights_nbytes(self, bits: float | None = None) -> int:
        """Of the model without adapters: of this plan, or at other bits."""
        return sum(self.weights.weights_on(bits).values())

    def row(self, name: str, recipe: Recipe | None = None, bits: float | None = None) -> dict[str, Any]:
        """One choice: what it takes, and within a memory the longest sequence and the largest batch."""
        recipe = recipe or self.recipe
        weights, memory = self.weights_nbytes(bits), self.request.memory
        nbytes = weights + self.footprint(recipe).total
        found: dict[str, Any] = {"choice": name, "nbytes": nbytes}
        if memory is None:
            return found
        return found | {
            "fits": nbytes <= memory,
            "longest_sequence": largest(
                lambda n: weights + self.footprint(recipe, length=n).total <= memory, self.limit
            ),
            "largest_batch": largest(
                lambda n: weights + self.footprint(recipe, batch=n).total <= memory, 1 << 16
            ),
        }

    def alternatives(self) -> list[dict[str, Any]]:
        """One change at a time; recomputing and packing together where that is less than recomputing."""
        recipe, request = self.recipe, self.request
        rows = [self.row("this plan")]
        for bits in (8, 4):
            if (request.activation_bits or 16) > bits and not request.checkpointing:
                rows.append(self.row(f"--activation-bits {bits}", replace(recipe, activation_bits=bits)))
        recomputing = replace(recipe, checkpointing=True)
        if not request.checkpointing:
            rows.append(self.row("--checkpointing", recomputing))
        if (request.activation_bits or 16) > 8:
            packed = replace(recomputing, activation_bits=8)
            row = self.row("--checkpointing --activation-bits 8", packed)
            if row["nbytes"] < rows[-1]["nbytes"]:  # packed log-probabilities are unpacked beside themselves
                rows.append(row)
        for step in (-1, 1):
            bits_then = self.weights.choice.bits + step
            if self.weights.exists(bits_then):
                rows.append(self.row(f"--bits {request.bits + step:g}", bits=bits_then))
        return rows

    def describe(self) -> dict[str, Any]:
        """Everything as plain data."""
        request, found = self.request, self.footprint(self.recipe)
        adapters = self.recipe.adapters
        budget = {"weights": self.weights_nbytes()} | vars(found)
        rows = self.alternatives()
        return {
            "model": self.source.name,
            "train": "lora",
            "fits": rows[0].get("fits"),
            "memory": request.memory,
            "card": request.card,
            "bits": self.weights.choice.bits,
            "sequence": request.length,
            "batch": request.batch,
            "targets": sorted(request.targets),
            "rank": request.rank,
            "adapted": sorted(adapters.ranks),
            "adapter_parameters": adapters.numel,
            "activation_bits": request.activation_bits,
            "checkpointing": request.checkpointing,
            "optimizer": request.optimizer,
            "lora_dropout": request.dropout,
            "nbytes": sum(budget.values()),
            "budget": budget,
            "max_position_embeddings": self.limit,
            "alternatives": rows,
        }
