"""Which weights of a model are compressed, to what, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from ciuic_hf.compressor.adaptive import adaptive_codecs_for
from ciuic_hf.config import ADAPTIVE, RAW, CompressionIntent, Setting
from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.experts import EXPERT_PARAMETERS, is_fused_experts, unsupported_reason
from ciuic_hf.planning.uniform import codec_ids
from ciuic_kernels import BlockGrid
from ciuic_kernels.layout import arena_nbytes

# What the input and output embeddings are called in transformers' decoders.
_EMBEDDING_NAMES = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embedding", "tok_embeddings")
_HEAD_NAMES = ("lm_head", "embed_out", "output_layer")


@dataclass(frozen=True)
class Target:
    """One parameter to compress.

    Attributes:
        module_name, parameter: where it is; ``name`` is both joined.
        role: see ``ciuic_hf.config``.
        shape: ``(N, K)`` or ``(E, N, K)``.
        codec_ids: uint8 ``[strips, kblocks]``, the same for every expert, or ``[E, strips, kblocks]``.
        adaptive: whether its codecs are to be chosen by its weights.
    """

    module_name: str
    parameter: str
    role: str
    shape: tuple[int, ...]
    codec_ids: Tensor
    adaptive: bool = False

    @property
    def name(self) -> str:
        return f"{self.module_name}.{self.parameter}" if self.module_name else self.parameter

    @cached_property
    def arena_nbytes(self) -> int:
        """Bytes of the arena, all experts together."""
        grid = BlockGrid(self.shape)
        if self.codec_ids.dim() == len(self.shape):
            return arena_nbytes(self.codec_ids, grid)
        return arena_nbytes(self.codec_ids, BlockGrid(self.shape[-2:])) * grid.matrices


@dataclass(frozen=True)
class Kept:
    """A weight that stays as it is."""

    name: str
    reason: str


def role_of(name: str, module: nn.Module, embeddings: nn.Module | None, head: nn.Module | None) -> str:
    """The role of a module; see ``ciuic_hf.config``."""
    if module is head:
        return "lm_head"
    if module is embeddings:
        return "embeddings"
    if embeddings is None and isinstance(module, nn.Embedding):
        return "embeddings"
    if head is None and name.split(".")[-1] == "lm_head":
        return "lm_head"
    return _role_of_linear(name)


def role_of_name(name: str, dims: int) -> str:
    """The role of a parameter of which only name and number of dimensions are known, as in a plan file."""
    if dims == 3:
        return "experts"
    parts = name.removesuffix(".weight").split(".")
    if parts[-1] in _HEAD_NAMES:
        return "lm_head"
    return "embeddings" if parts[-1] in _EMBEDDING_NAMES else _role_of_linear(name)


def _role_of_linear(name: str) -> str:
    parts = name.split(".")
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any("shared_expert" in part for part in parts):
        return "shared_experts"
    if any(part in ("experts", "expert") for part in parts):
        return "experts"
    return "mlp" if any(part in ("mlp", "feed_forward", "ffn") for part in parts) else "linear"


def find_targets(
    model: nn.Module,
    intent: CompressionIntent,
    keep_patterns: Iterable[str] = (),
    ties: Mapping[str, str] | None = None,
) -> tuple[list[Target], list[Kept]]:
    """Every matrix of the model, to compress or to keep.

    Args:
        model: may be on meta; uses ``get_input_embeddings`` and ``get_output_embeddings`` where it has them. Of a
            model without, every embedding is a token table.
        keep_patterns: parts of names that the model keeps in float32.
        ties: name -> the name of the same parameter that comes first; the model's ``all_tied_weights_keys`` if None.

    Raises:
        CiuicError: for an unsupported experts layout, a pattern that matches nothing, tied weights that are
            set to different things. Targets that are ``adaptive`` get the codec of blocks without zeros.
    """
    embeddings, head = (
        getattr(model, getter, lambda: None)() for getter in ("get_input_embeddings", "get_output_embeddings")
    )
    keep_patterns = list(keep_patterns)
    targets: list[Target] = []
    kept: list[Kept] = []
    for name, module in model.named_modules():
        candidates = _candidates(name, module, embeddings, intent)
        role = role_of(name, module, embeddings, head)
        for parameter, weight in candidates:
            full_name = f"{name}.{parameter}" if name else parameter
            reason = _reason_to_keep(full_name, module, keep_patterns) or _reason_of_router(
                model, name, module
            )
            outcome = reason or _plan(full_name, role if weight.dim() == 2 else "experts", weight, intent)
            if isinstance(outcome, str):
                kept.append(Kept(full_name, outcome))
            else:
                targets.append(Target(name, parameter, role if weight.dim() == 2 else "experts", *outcome))
        kept += _other_matrices(name, module, {parameter for parameter, _ in candidates})
    intent.check_used([t.name for t in targets] + [k.name for k in kept])
    _settle_experts(targets, kept)
    return _settle_ties(
        targets, kept, intent, getattr(model, "all_tied_weights_keys", None) if ties is None else ties
    )


def _candidates(
    name: str, module: nn.Module, embeddings: nn.Module | None, intent: CompressionIntent
) -> list[tuple[str, Tensor]]:
    """Parameters of one module that could be compressed."""
    is_table = isinstance(module, nn.Embedding) and (embeddings is None or module is embeddings)
    if isinstance(module, nn.Linear) or is_table:
        weight = module._parameters.get("weight")
        return [("weight", weight)] if weight is not None and weight.dim() == 2 else []
    if is_fused_experts(module) and "experts" in name:
        names = [p for p, weight in module._parameters.items() if weight is not None and weight.dim() == 3]
        raw = all(intent.setting(f"{name}.{p}", "experts") == RAW for p in names)
        reason = unsupported_reason(module)
        if reason and not raw:
            raise CiuicError(
                f"The experts {name} ({type(module).__name__}) cannot be compressed: {reason}. "
                'Pass modules={"experts": "raw"} to leave them in full precision.'
            )
        return [(p, getattr(module, p)) for p in (EXPERT_PARAMETERS if not reason else names)]
    return []


def _reason_to_keep(name: str, module: nn.Module, keep_patterns: list[str]) -> str:
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
        return f"{type(module).__name__} has a forward of its own"
    if isinstance(module, nn.Embedding) and (type(module) is not nn.Embedding or module.max_norm is not None):
        return f"{type(module).__name__} has a forward of its own"
    if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):
        return "its forward was replaced"
    if any(part in name for part in keep_patterns):
        return "the model keeps it in float32"
    return ""


def _reason_of_router(model: nn.Module, name: str, module: nn.Module) -> str:
    """Routers are small and decide everything: a Linear beside the experts with no more outputs than experts."""
    beside = getattr(model.get_submodule(name.rpartition(".")[0]), "experts", None)
    if not isinstance(module, nn.Linear) or not isinstance(beside, nn.Module):
        return ""
    fused = [p.shape[0] for p in beside.parameters(recurse=False) if p.dim() == 3]
    count = len(beside) if isinstance(beside, nn.ModuleList) else max(fused, default=0)
    return "a router" if module.out_features <= count else ""


def _plan(
    name: str, role: str, weight: Tensor, intent: CompressionIntent
) -> tuple[tuple[int, ...], Tensor, bool] | str:
    """Shape, codecs and ``adaptive`` of one parameter, or the reason to keep it."""
    setting: Setting = intent.setting(name, role)
    if setting == RAW or (isinstance(setting, float) and setting >= 16):
        return f"asked for ({role}: {setting})"
    if setting == ADAPTIVE:
        return tuple(weight.shape), adaptive_codecs_for(tuple(weight.shape), None), True
    try:
        return tuple(weight.shape), codec_ids(tuple(weight.shape[-2:]), setting), False
    except CiuicError as error:
        return f"too small ({error})"


def _other_matrices(name: str, module: nn.Module, seen: set[str]) -> list[Kept]:
    """Matrices that are no candidates: routers, position tables, convolutions."""
    return [
        Kept(f"{name}.{parameter}" if name else parameter, f"a parameter of {type(module).__name__}")
        for parameter, weight in module._parameters.items()
        if weight is not None and weight.dim() >= 2 and parameter not in seen
    ]


def _settle_experts(targets: list[Target], kept: list[Kept]) -> None:
    """The parameters of fused experts are compressed together or not at all: one product computes with both."""
    reasons = {k.name: k.reason for k in kept}
    for target in [t for t in targets if t.parameter in EXPERT_PARAMETERS]:
        for other in (f"{target.module_name}.{parameter}" for parameter in EXPERT_PARAMETERS):
            if other in reasons:
                targets.remove(target)
                kept.append(Kept(target.name, f"goes with {other}, which is kept: {reasons[other]}"))


def _settle_ties(
    targets: list[Target], kept: list[Kept], intent: CompressionIntent, ties: Mapping[str, str] | None
) -> tuple[list[Target], list[Kept]]:
    """Tied parameters get the choice of the one they are tied to; they must not be told different things."""
    tied = dict(ties or {})
    by_name = {target.name: target for target in targets}
    reasons = {k.name: k for k in kept}
    for name, source in tied.items():
        if name not in by_name and source not in by_name:
            continue
        told = {key: intent.modules[key] for key in ("embeddings", "lm_head") if key in intent.modules}
        if len(told) == 2 and len(set(told.values())) == 2:
            raise CiuicError(
                f"{name} is tied to {source}, so both are stored once; modules asks for {told}. Give them the same."
            )
        raw = [n for n in (name, source) if n not in by_name]
        if raw:
            for other in {name, source} & set(by_name):
                targets.remove(by_name.pop(other))
                reasons[other] = Kept(other, f"tied to {raw[0]}, which is kept: {reasons[raw[0]].reason}")
                kept.append(reasons[other])
            continue
        choice = by_name[name] if "lm_head" in told else by_name[source]
        for other in (name, source):
            old = by_name[other]
            by_name[other] = replace(old, codec_ids=choice.codec_ids, adaptive=choice.adaptive)
            targets[targets.index(old)] = by_name[other]
    return targets, kept
