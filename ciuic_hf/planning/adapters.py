"""Which weights get LoRA adapters, and how many parameters these have: from a config alone.

A matrix ``[N, K]`` gets ``rank * (N + K)``, a parameter of experts ``[E, N, K]`` ``E`` times that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ciuic_hf.errors import CiuicError
from ciuic_hf.planning.memory import Sizes

ADAPTER_NBYTES = 4
"""Of one adapter parameter: PEFT keeps adapters of half-precision models in float32."""
SUPPORTED = ("deepseek_v2", "deepseek_v3", "llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` whose layers the formulas of training were checked against."""
GATE_UP, DOWN, ROUTER = "experts.gate_up_proj", "experts.down_proj", "gate.weight"
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layout:
    """What stands in the layers of a model.

    Attributes:
        attention, mlp: Linears by name as ``(N, K)``; ``mlp`` of a dense layer.
        experts: fused parameters and the router by name as ``(E, N, K)``.
        dense, sparse: how many layers have a dense part, and how many experts. Dense ones come first.
    """

    sizes: Sizes
    attention: dict[str, tuple[int, int]]
    mlp: dict[str, tuple[int, int]]
    experts: dict[str, tuple[int, int, int]]
    dense: int
    sparse: int

    @classmethod
    def of(cls, sizes: Sizes) -> Layout:
        """Raises CiuicError for a model whose layers are not known."""
        config = sizes.config
        kind = config.get("model_type")
        if kind not in SUPPORTED:
            raise CiuicError(
                f"Training of a {kind} model cannot be planned; the formula knows {', '.join(SUPPORTED)}."
            )
        hidden, heads = sizes.hidden, sizes.heads
        queries, outputs = heads * sizes.key_width, heads * sizes.value_width
        attention: dict[str, tuple[int, int]] = {}
        if sizes.latent:
            rank = int(config.get("q_lora_rank") or 0)
            if rank:
                attention |= {"q_a_proj": (rank, hidden), "q_b_proj": (queries, rank)}
            else:
                attention |= {"q_proj": (queries, hidden)}
            attention["kv_a_proj_with_mqa"] = (sizes.latent + sizes.rotary, hidden)
            expanded = heads * (sizes.key_width - sizes.rotary + sizes.value_width)
            attention["kv_b_proj"] = (expanded, sizes.latent)
        else:
            shared = sizes.shared * sizes.key_width
            attention |= {"q_proj": (queries, hidden), "k_proj": (shared, hidden), "v_proj": (shared, hidden)}
        attention["o_proj"] = (hidden, outputs)
        mlp = dict.fromkeys(_MLP[:2], (sizes.dense, hidden)) | {"down_proj": (hidden, sizes.dense)}
        count = int(config.get("n_routed_experts") or 0) if sizes.routed else 0
        dense = min(sizes.layers, int(config.get("first_k_dense_replace") or 0)) if count else sizes.layers
        experts: dict[str, tuple[int, int, int]] = {}
        if count:
            experts = {
                GATE_UP: (count, 2 * sizes.expert, hidden),
                DOWN: (count, hidden, sizes.expert),
                ROUTER: (1, count, hidden),
            }
        return cls(sizes, attention, mlp, experts, dense, sizes.layers - dense)


@dataclass(frozen=True)
class Adapters:
    """LoRA adapters on some of a layout's weights.

    Attributes:
        ranks: name of a weight -> rank of its adapter.
        dropout: whether their inputs are dropped out.
    """

    layout: Layout
    ranks: dict[str, int]
    dropout: bool = False

    @classmethod
    def of(cls, layout: Layout, targets: Iterable[str], rank: int, dropout: bool = False) -> Adapters:
        """Adapters on ``targets``: ``attention``, ``mlp``, ``experts``, ``all-linear`` or names of Linears.

        ``all-linear`` is what PEFT makes of it: every Linear but lm_head; in a model with experts, attention, the
        router, and experts with twice the rank for the fused gate and up (PEFT 0.21).

        Raises:
            CiuicError: for a name that the model does not have, a rank below 1, or dropout before experts.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise CiuicError(f"The rank of adapters is a positive integer, got {rank!r}.")
        groups: dict[str, dict[str, int]] = {"attention": dict.fromkeys(layout.attention, rank)}
        names = groups["attention"]
        if layout.experts:
            groups["experts"] = {GATE_UP: rank, DOWN: rank}
            groups["all-linear"] = names | {GATE_UP: 2 * rank, DOWN: rank, ROUTER: rank}
        else:
            groups["mlp"] = dict.fromkeys(layout.mlp, rank)
            groups["all-linear"] = names | groups["mlp"]
        singles = {name: {name: rank} for name in (groups["all-linear"] if layout.dense else names)}
        known = groups | {name: one for name, one in singles.items() if "." not in name}
        ranks: dict[str, int] = {}
        for target in targets:
            if target not in known:
                raise CiuicError(
                    f"Adapters go on {', '.join(known)} of this {layout.sizes.config['model_type']} model, "
                    f"got {target!r}."
                )
            ranks |= known[target]
        if not ranks:
            raise CiuicError("Adapters need at least one target, such as attention.")
        if dropout and layout.experts.keys() & ranks.keys():
            raise CiuicError("PEFT has no dropout for adapters on experts; leave it at 0, or name attention.")
        return cls(layout, ranks, dropout)

    def parameters(self) -> list[tuple[int, int]]:
        """``(elements, tensors that have so many)`` of both factors of every adapter."""
        layout, found = self.layout, []
        for name, rank in self.ranks.items():
            count, rows, cols, layers = 1, 0, 0, layout.sizes.layers
            if name in layout.attention:
                rows, cols = layout.attention[name]
            elif name in layout.experts:
                count, rows, cols = layout.experts[name]
                layers = layout.sparse
            else:
                (rows, cols), layers = layout.mlp[name], layout.dense
            found += [(count * rank * rows, layers), (count * rank * cols, layers)]
        return found

    @property
    def numel(self) -> int:
        """Parameters of all adapters."""
        return sum(numel * tensors for numel, tensors in self.parameters())
