"""What a LoRA training step takes beside the frozen weights, from a config alone.

The peak is what is held throughout (adapters, gradients, optimizer state) plus the largest of three moments:

* loss: everything that was saved for the backward pass, and of the logits three copies in float32: log-probabilities,
  the gradient with respect to them, and with respect to logits. Packed log-probabilities are a fourth.
* layer: what was saved, and the largest operator of the last layer on the way back; under gradient checkpointing the
  whole layer as well, recomputed and not packed.
* step: one copy of the adapters that AdamW makes on a GPU, when activations are gone.

Gradients count throughout, as they do when several batches are accumulated. No autocast, no padding, loss by
transformers over all logits. What is saved: :mod:`ciuic_hf.planning.saved`, counted exactly; the moments on top of it
follow from reading torch and were not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.adapters import ADAPTER_NBYTES, GATE_UP, Adapters
from ciuic_hf.planning.memory import SLACK, Run
from ciuic_hf.planning.saved import Batch, Saved, Step, total_nbytes

OPTIMIZERS = {"adamw": 8, "sgd": 0}
"""Name -> bytes of state for each parameter: AdamW's two moments in float32; SGD without momentum has none."""
PACKED_FROM = 1024
"""Elements below which ``compress_activations`` packs nothing."""


@dataclass(frozen=True)
class Recipe:
    """How adapters are trained.

    Attributes:
        activation_bits: of ``compress_activations``, None without it.
        checkpointing: whether layers are recomputed.
        optimizer: of :data:`OPTIMIZERS`.
        packed: shape and bits -> bytes that rounded values take when packed.
    """

    adapters: Adapters
    run: Run
    packed: Callable[[Sequence[int], int], int]
    activation_bits: int | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"

    def nbytes(self, saved: Iterable[Saved]) -> int:
        """What is held of saved tensors."""
        return sum(map(self._nbytes_of, saved))

    def _nbytes_of(self, saved: Saved) -> int:
        if self.activation_bits is None:
            return saved.nbytes
        if saved.numel < PACKED_FROM:
            return saved.numel * saved.itemsize
        if saved.exact:
            return -(-saved.numel * saved.exact // 8)
        return self.packed([saved.numel], max(saved.least, self.activation_bits))


@dataclass(frozen=True)
class TrainingFootprint:
    """Bytes beside the frozen weights, by purpose; see the module.

    Attributes:
        activations: saved for the backward pass.
        logits: they, their log-probabilities and the gradients of both.
        working: by how much another moment exceeds that of the loss.
    """

    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    slack: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def held(self) -> int:
        """What is there between steps."""
        return self.adapters + self.optimizer


def training_footprint(recipe: Recipe, length: int, batch: int) -> TrainingFootprint:
    """What a step on ``batch`` sequences of ``length`` tokens needs.

    Raises:
        CiuicError: for a length or batch below 1, or an optimizer that is not known.
    """
    for name, value in (("seq", length), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CiuicError(f"{name} must be a positive integer, got {value!r}.")
    if recipe.optimizer not in OPTIMIZERS:
        raise CiuicError(
            f"The optimizer is one of {', '.join(OPTIMIZERS)}, got {recipe.optimizer!r}; others differ by their state."
        )
    step = Step(recipe.adapters, recipe.run, Batch(batch, length))
    *end, log_probabilities = step.end
    if recipe.checkpointing:
        layers = recipe.nbytes([step.layer_input] * len(step.layers))
    else:
        layers = sum(recipe.nbytes(layer) for layer in step.layers) + recipe.nbytes(step.shared.values())
    activations = layers + recipe.nbytes(end)
    copies = 2 if recipe.activation_bits is None else 3
    logits = recipe.nbytes([log_probabilities]) + copies * log_probabilities.nbytes
    numel = recipe.adapters.numel
    at_layer = _layer_nbytes(recipe, step) - logits
    at_step = (ADAPTER_NBYTES * numel if recipe.run.device == "cuda" else 0) - activations - logits
    parts = {
        "adapters": ADAPTER_NBYTES * numel,
        "gradients": ADAPTER_NBYTES * numel,
        "optimizer": OPTIMIZERS[recipe.optimizer] * numel,
        "activations": activations,
        "logits": logits,
        "working": max(0, at_layer, at_step),
    }
    transient = sum(parts[name] for name in ("activations", "logits", "working"))
    return TrainingFootprint(**parts, slack=int(SLACK * transient))


def _layer_nbytes(recipe: Recipe, step: Step) -> int:
    """Beside what was saved, while the gradient passes through the last layer."""
    unpacks = recipe.activation_bits is not None and not recipe.checkpointing
    feed_forward = _experts_nbytes(step, unpacks) if step.layout.sparse else _dense_nbytes(step, unpacks)
    passed = 2 * step.element * step.sizes.hidden  # the gradient of the residual and of the part
    nbytes = step.batch.tokens * (passed + max(feed_forward, _attention_nbytes(step, unpacks)))
    nbytes += step.sizes.band_nbytes(step.element, recipe.run.device, step.batch.tokens)
    if recipe.checkpointing:
        nbytes += total_nbytes(step.layers[-1])
    return nbytes


def _dense_nbytes(step: Step, unpacks: bool) -> int:
    """Of one token: the gradient of ``down_proj``'s input in float32 and cast, or of the product and its parts."""
    width, element = step.sizes.dense, step.element
    product = (4 + element) * width
    if "down_proj" in step.adapters.ranks:
        product += (4 if unpacks else 0) * width + 4 * step.sizes.hidden
    return max(product, (5 if unpacks else 3) * element * width)


def _experts_nbytes(step: Step, unpacks: bool) -> int:
    """Of one token, while the weighted sum of its experts goes back: two products in float32, and a cast one."""
    rows, element, sizes = step.sizes.routed, step.element, step.sizes
    summing = rows * sizes.hidden * (8 + element + (element if unpacks else 0))
    gating = rows * sizes.expert * (4 + 3 * element)
    if GATE_UP in step.adapters.ranks:
        gating += rows * sizes.expert * 2 * element
    return max(summing, gating)


def _attention_nbytes(step: Step, unpacks: bool) -> int:
    """Of one token: gradients of queries, keys and values; without a kernel of its own those of scores too."""
    sizes, element = step.sizes, step.element
    path = step.run.path_of(sizes)
    queries, values = sizes.heads * sizes.key_width, sizes.heads * sizes.value_width
    if path == "flash":
        return element * (2 * queries + 2 * values + (2 * queries + 2 * values if unpacks else 0))
    scores = sizes.heads * step.batch.length * (8 + (4 if unpacks else 0))
    return scores + (4 if path == "math" else element) * (2 * queries + values)
