"""What autograd saves for the backward pass while adapters of a frozen decoder train: from a config alone.

Per token, with element size ``e``; what is not in the list saves nothing, as a compressed weight keeps no input:

* RMSNorm: its input in float32, and one number.
* an adapter: its input in float32 (a copy for each adapter, as PEFT casts), and ``rank`` values; with dropout a mask.
* attention without scores: queries, keys, values, outputs in ``e``, and a number for each head in float32. The values
  of multi-head latent attention are a view that keeps all of what ``kv_b_proj`` made. torch's fallback: scaled
  queries, keys, probabilities and values in float32. eager: queries, repeated keys and values and probabilities in
  ``e``, probabilities in float32.
* a gated part: the inputs of the activation, its outputs and what they are multiplied with, in ``e``.
* experts: that for each routed row, their outputs in ``e`` and weights in float32; scores and indices of the router.
  Adapters of experts keep their input in ``e``.
* loss: log-probabilities in float32, and labels.

Nothing is saved before the first adapter: no gradient goes there. With gradient checkpointing a layer saves its input.
Read off transformers 5.23, PEFT 0.21 and torch 2.13, and checked by counting (``tests/planning/test_training.py``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ciuic_hf.planning.adapters import DOWN, GATE_UP, ROUTER, Adapters
from ciuic_hf.planning.memory import Run


@dataclass(frozen=True)
class Saved:
    """Values that wait for the backward pass.

    Attributes:
        numel: how many; ``held`` of them stay in memory where this is a view and nothing packs it.
        least: fewest bits that they are rounded to.
        exact: bits of each where packing keeps them exactly, as masks and indices; 0 for those that are rounded.
    """

    numel: int
    itemsize: int
    least: int = 2
    exact: int = 0
    held: int = 0

    @property
    def nbytes(self) -> int:
        """Uncompressed, with whatever it is a view of."""
        return max(self.numel, self.held) * self.itemsize


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, without padding."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Step:
    """The forward pass of a training step, walked through for what it saves.

    Attributes:
        layers: what each layer saves.
        shared: what all layers share: the tables of rotary embedding.
        end: the final norm and the loss; the log-probabilities come last.
    """

    def __init__(self, adapters: Adapters, run: Run, batch: Batch) -> None:
        self.adapters, self.layout, self.sizes = adapters, adapters.layout, adapters.layout.sizes
        self.run, self.batch, self.element = run, batch, run.element_nbytes
        self.shared: dict[str, Saved] = {}
        self.layers: list[list[Saved]] = []
        self._found: dict[str, Saved] = {}
        self._flows = False  # whether the gradient goes through the residual
        for layer in range(self.sizes.layers):
            self._layer(layer >= self.layout.dense)
            self.layers.append(list(self._found.values()))
            self._found = {}
        self._norm("final", self.sizes.hidden)
        self._save("labels", 1, 8, exact=index_bits(self.sizes.vocabulary))
        self._save("log-probabilities", self.sizes.vocabulary, 4, least=4)
        self.end = list(self._found.values())

    @property
    def layer_input(self) -> Saved:
        """What gradient checkpointing saves of a layer."""
        return Saved(self.batch.tokens * self.sizes.hidden, self.element)

    def _save(self, name: str, width: int, itemsize: int, **more: int) -> None:
        """``width`` values for each token."""
        if "held" in more:
            more["held"] *= self.batch.tokens
        self._found[name] = Saved(width * self.batch.tokens, itemsize, **more)

    def _norm(self, name: str, width: int, heads: int = 1) -> None:
        """In float32, computed from a cast copy."""
        if self._flows:
            self._save(f"{name} norm", heads * width, 4)
            self._save(f"{name} variance", heads, 4, least=8)

    def _linear(self, name: str, width: int, source: str, flows: bool) -> bool:
        """A product with an input of ``width``; whether the gradient goes through it."""
        rank = self.adapters.ranks.get(name)
        if rank is None:
            return flows
        copied = self.element != 4 or self.adapters.dropout
        self._save(f"{name} input" if copied else source, width, 4)
        self._save(f"{name} low rank", rank, 4)
        if self.adapters.dropout and flows:
            on_cpu = self.run.device == "cpu"
            self._save(f"{name} mask", width, 4 if on_cpu else 1, exact=0 if on_cpu else 1)
        return True

    def _layer(self, sparse: bool) -> None:
        self._norm("input", self.sizes.hidden)
        queries, keys, values = self._latent_inputs() if self.sizes.latent else self._grouped_inputs()
        if queries or keys:
            self._rotary()
        attended = self._attend(queries, keys, values)
        outputs = self.sizes.heads * self.sizes.value_width
        flash = self.run.path_of(self.sizes) == "flash" and not self.sizes.latent
        projected = self._linear("o_proj", outputs, "outputs" if flash else "joined", attended)
        self._flows = self._flows or projected
        self._norm("post", self.sizes.hidden)
        if sparse:
            shared = int(self.sizes.config.get("n_shared_experts") or 0)
            routed = self._experts()
            inside = self._gated("shared", shared * self.sizes.expert, self._flows) if shared else False
            self._flows = self._flows or routed or inside
        else:
            self._flows = self._dense() or self._flows

    def _grouped_inputs(self) -> tuple[bool, bool, bool]:
        sizes, flows = self.sizes, self._flows
        found = [self._linear(name, sizes.hidden, "hidden", flows) for name in ("q_proj", "k_proj", "v_proj")]
        if sizes.config["model_type"] == "qwen3":
            for name, heads, here in (("q", sizes.heads, found[0]), ("k", sizes.shared, found[1])):
                if here:
                    self._save(f"{name} norm", heads * sizes.key_width, 4)
                    self._save(f"{name} variance", heads, 4, least=8)
        return found[0], found[1], found[2]

    def _latent_inputs(self) -> tuple[bool, bool, bool]:
        sizes, flows, rank = self.sizes, self._flows, int(self.sizes.config.get("q_lora_rank") or 0)
        if rank:
            reduced = self._linear("q_a_proj", sizes.hidden, "hidden", flows)
            if reduced:
                self._save("queries norm", rank, 4)
                self._save("queries variance", 1, 4, least=8)
            queries = self._linear("q_b_proj", rank, "reduced", reduced)
        else:
            queries = self._linear("q_proj", sizes.hidden, "hidden", flows)
        latents = self._linear("kv_a_proj_with_mqa", sizes.hidden, "hidden", flows)
        if latents:
            joined = (
                sizes.latent + sizes.rotary if self.element == 4 else 0
            )  # a view, where no cast copies it
            self._save("latents norm", sizes.latent, 4, held=joined)
            self._save("latents variance", 1, 4, least=8)
        expanded = self._linear("kv_b_proj", sizes.latent, "latents", latents)
        return queries, latents or expanded, expanded

    def _rotary(self) -> None:
        """Tables for one sequence; V2's are complex, V3's are halves of wider ones."""
        length, width = self.batch.length, self.sizes.rotary or self.sizes.key_width
        if self.sizes.config["model_type"] == "deepseek_v2":
            self.shared["turns"] = Saved(length * width // 2, 8, exact=64)
            return
        halves = 2 if self.sizes.latent and self.sizes.config.get("rope_interleave", True) else 1
        for name in ("cosines", "sines"):
            self.shared[name] = Saved(length * width // halves, self.element, held=length * width)

    def _attend(self, queries: bool, keys: bool, values: bool) -> bool:
        sizes, element = self.sizes, self.element
        flows = queries or keys or values
        if not flows:
            return False
        asked, told = sizes.heads * sizes.key_width, sizes.heads * sizes.value_width
        path, context = self.run.path_of(sizes), self.batch.length
        if path == "flash":
            self._save("queries", asked, element)
            if sizes.latent:
                expanded = sizes.heads * (sizes.key_width - sizes.rotary) + told
                self._save("keys", asked, element)
                self._save("values", told, element, held=expanded)
            else:
                self._save("keys", sizes.shared * sizes.key_width, element)
                self._save("values", sizes.shared * sizes.key_width, element)
            self._save("outputs", told, element)
            self._save("normalisers", sizes.heads, 4, least=8)
            return True
        itemsize, scored = 4 if path == "math" else element, queries or keys
        if keys:
            self._save("queries", asked, itemsize)
        if queries:
            self._save("keys", asked, itemsize)
        if scored:
            self._save("values", told, itemsize)
            # torch's fallback calls softmax inside of an operator, where nothing tells that it is one
            self._save("probabilities", sizes.heads * context, 4, least=8 if path == "eager" else 2)
        if values and itemsize != 4:
            self._save("narrow probabilities", sizes.heads * context, itemsize)
        return True

    def _gated(self, name: str, width: int, flows: bool, up: bool | None = None) -> bool:
        """``act(gate) * up`` where the gradient goes through the gate (and through up, unless told otherwise)."""
        up = flows if up is None else up
        if flows:
            self._save(f"{name} gate", width, self.element)
            self._save(f"{name} up", width, self.element)
        if up:
            self._save(f"{name} activated", width, self.element)
        return flows or up

    def _dense(self) -> bool:
        hidden, width, flows = self.sizes.hidden, self.sizes.dense, self._flows
        gate = self._linear("gate_proj", hidden, "normalised", flows)
        up = self._linear("up_proj", hidden, "normalised", flows)
        return self._linear("down_proj", width, "product", self._gated("dense", width, gate, up))

    def _experts(self) -> bool:
        sizes, element, ranks = self.sizes, self.element, self.adapters.ranks
        routing = self._router()
        rows, flows = sizes.routed, self._flows
        if flows or GATE_UP in ranks or DOWN in ranks or routing:
            self._save("chosen", rows, 8, exact=index_bits(self.layout.experts[ROUTER][1]))
        if GATE_UP in ranks:
            self._save("normalised" if element == 4 else "experts input", sizes.hidden, element)
        gated = flows or GATE_UP in ranks
        if gated:  # halves of one product
            self._save("experts gate and up", 2 * rows * sizes.expert, element)
            self._save("experts activated", rows * sizes.expert, element)
        if DOWN in ranks:
            self._save("experts product", rows * sizes.expert, element)
        if gated or DOWN in ranks:
            self._save("expert weights", rows, 4)
        if routing:
            self._save("experts output", rows * sizes.hidden, element)
        return gated or DOWN in ranks or routing

    def _router(self) -> bool:
        """Scores and indices; whether the gradient goes through them."""
        config, ranks = self.sizes.config, self.adapters.ranks
        if not self._flows and ROUTER not in ranks:
            return False
        experts = self.layout.experts[ROUTER][1]
        groups, kept = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
        if ROUTER in ranks:
            self._save("normalised" if self.element == 4 else "router input", self.sizes.hidden, 4)
            self._found["router weight"] = Saved(experts * self.sizes.hidden, 4)
        v2 = config["model_type"] == "deepseek_v2"
        self._save("scores", experts, 4, least=8 if v2 else 2)
        if not v2 or config.get("topk_method") == "group_limited_greedy":
            self._save("group scores", groups * (1 if v2 else 2), 8, exact=index_bits(experts // groups))
            self._save("groups", kept, 8, exact=index_bits(groups))
            self._save("masked", experts, 1, exact=1)
        if not v2 and config.get("norm_topk_prob", True):
            self._save("sums", 1, 4, least=8)
            self._save("normalised weights", self.sizes.routed, 4)
        return True


def index_bits(values: int) -> int:
    """Bits of indices below ``values`` in the smallest type that holds them."""
    return 8 if values <= 1 << 8 else 16 if values <= 1 << 15 else 32


def total_nbytes(saved: Iterable[Saved]) -> int:
    """Uncompressed."""
    return sum(one.nbytes for one in saved)
