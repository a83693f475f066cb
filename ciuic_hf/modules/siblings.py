"""Linears that are called with one and the same input, multiplied together (docs/adr/029).

``q_proj(x)``, ``k_proj(x)`` and ``v_proj(x)`` stand on three lines of somebody else's code. The first that is called
computes all of them with ``ciuic::linears`` and keeps the other results; a sibling that is then called with the very
same, unmodified tensor takes its own. Whatever is different, a linear computes for itself: a group that does not fit
the code around it costs time, never a result.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ciuic_kernels import ops
from ciuic_kernels.selection import MAX_SHARED, SHARED_BLOCK_M

if TYPE_CHECKING:
    from ciuic_hf.modules.linear import CiuicLinear

FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "kv_a_proj_with_mqa"),
    ("q_a_proj", "kv_a_proj_with_mqa", "indexer.wk"),
    ("q_b_proj", "indexer.wq_b"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names below one module of linears that models call with one tensor. They are tried, not trusted."""


@dataclass
class _Round:
    """One input on its way through the siblings, from the first call to the last.

    Attributes:
        x: what the first was called with; when it dies, so do the outputs.
        waiting: siblings that have not been called with it yet.
        outputs: results of those, where they were computed together.
        weights: what each of those was computed from.
    """

    x: weakref.ref[Tensor]
    version: int
    stream: int
    waiting: set[int]
    outputs: dict[int, Tensor]
    weights: dict[int, tuple[Any, ...]]

    def is_of(self, x: Tensor) -> bool:
        """Whether x is that object, not written to since, and the work that follows is queued on the same stream."""
        return self.x() is x and self.version == x._version and self.stream == _stream(x)


class Siblings:
    """Two or three linears with one input.

    They are multiplied together once a round has shown that their callers do give all of them the same tensor, and
    no more when a result was left over, until another round has shown it.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.proven = False
        self._members: list[weakref.ref[CiuicLinear] | None] = [None] * size
        self._here = threading.local()  # threads have rounds of their own

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # copied members join by themselves

    def join(self, place: int, module: CiuicLinear) -> None:
        """Take a place that is free."""
        if self.member(place) is None:
            self._members[place] = weakref.ref(module)

    def member(self, place: int) -> CiuicLinear | None:
        reference = self._members[place]
        return None if reference is None else reference()

    def members(self) -> list[CiuicLinear]:
        """All of them, or none when one is gone."""
        found = [self.member(place) for place in range(self.size)]
        present = [member for member in found if member is not None and member.is_compressed]
        return present if len(present) == self.size else []

    def output(self, place: int, module: CiuicLinear, x: Tensor) -> Tensor | None:
        """The product of a member with x, where it was or is now computed together; None where it must be alone."""
        if self.member(place) is not module or not _can_be_followed(x):
            return None
        current: _Round | None = getattr(self._here, "round", None)
        if current is not None:
            if place in current.waiting and current.is_of(x):
                current.waiting.discard(place)
                if not current.waiting:
                    self._here.round, self.proven = None, True
                output, weights = current.outputs.pop(place, None), current.weights.get(place)
                return output if weights is not None and _is_good(module, x, weights) else None
            self.proven = False
        outputs, weights_of = self._together(x) if self.proven else ({}, {})
        own = outputs.pop(place, None)
        self._here.round = _Round(
            weakref.ref(x, lambda _: outputs.clear()),
            x._version,
            _stream(x),
            set(range(self.size)) - {place},
            outputs,
            weights_of,
        )
        return own

    def _together(self, x: Tensor) -> tuple[dict[int, Tensor], dict[int, tuple[Any, ...]]]:
        """The products of all members, and what they were computed from; nothing where they do not go together."""
        members = self.members()
        if x.numel() > SHARED_BLOCK_M * x.shape[-1] or not members or not all(_fits(m, x) for m in members):
            return {}, {}
        outputs = multiply(members, x)
        return dict(enumerate(outputs)), {place: _weights(m) for place, m in enumerate(members)}


def multiply(modules: Iterable[CiuicLinear], x: Tensor) -> list[Tensor]:
    """``[..., K] -> [..., N]`` of each of some linears on x's device, by ``ciuic::linears``."""
    modules = list(modules)
    derived = [module.derived("weight") for module in modules]
    biases = [module.bias for module in modules]
    outputs: list[Tensor] = ops.linears(
        x,
        [module.weight for module in modules],
        [module.weight_tags for module in modules],
        [d.offsets for d in derived],
        [d.work for d in derived],
        [kind for d in derived for kind in d.kinds],
        [len(d.kinds) for d in derived],
        [bias for bias in biases if bias is not None],
        [bias is not None for bias in biases],
        [module.out_features for module in modules],
        modules[0].in_features,
    )
    return outputs


def group_siblings(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Group the linears of a model by their names; those that are in a group stay there.

    Returns:
        the groups that were made, as ``families`` gives them.
    """
    from ciuic_hf.modules.linear import CiuicLinear

    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CiuicLinear) and module._siblings is None
        if module.is_compressed and not module.trains_weight
    }
    groups = families({name: linear.in_features for name, linear in linears.items()})
    for parent, members in groups:
        siblings = Siblings(len(members))
        for place, below in enumerate(members):
            linear = linears[parent + below]
            siblings.join(place, linear)
            linear._siblings = siblings, place
    if groups and torch.cuda.is_available():
        from ciuic_kernels import inductor  # imports the compiler

        inductor.install()
    return groups


def families(widths: Mapping[str, int]) -> list[tuple[str, list[str]]]:
    """Linears that probably have one input, by their names.

    Args:
        widths: full name -> input features.

    Returns:
        what the names of a group begin with, its dot included, and what they end with; two or three of one width.
    """
    endings = dict.fromkeys(below for family in FAMILIES for below in family)
    parents = dict.fromkeys(
        name.removesuffix(below)
        for name in widths
        for below in endings
        if name == below or name.endswith(f".{below}")
    )
    groups: list[tuple[str, list[str]]] = []
    taken: set[str] = set()
    for parent in parents:
        for family in FAMILIES:
            found = [b for b in family if parent + b in widths and parent + b not in taken]
            if 1 < len(found) <= MAX_SHARED and len({widths[parent + below] for below in found}) == 1:
                taken.update(parent + below for below in found)
                groups.append((parent, found))
    return groups


def _fits(module: CiuicLinear, x: Tensor) -> bool:
    """Whether a member can be multiplied with x now, without a gradient: recomputed activations keep their bits."""
    tensors = [module.weight, *([] if module.bias is None else [module.bias])]
    return (
        not module.training
        and module.in_features == x.shape[-1]
        and not any(t.device != x.device or t.is_inference() for t in tensors)
        and not (torch.is_grad_enabled() and (x.requires_grad or tensors[-1].requires_grad))
    )


def _weights(module: CiuicLinear) -> tuple[Any, ...]:
    """What changes when a weight or bias does. The derived tables are made anew with every other arena or device."""
    bias = module.bias
    return module.derived("weight"), module.weight._version, bias, None if bias is None else bias._version


def _is_good(module: CiuicLinear, x: Tensor, before: tuple[Any, ...]) -> bool:
    """Whether a result that was computed from ``before`` is what the member would compute now."""
    now = _weights(module)
    return _fits(module, x) and before[0] is now[0] and before[2] is now[2] and before[1::2] == now[1::2]


def _can_be_followed(x: Tensor) -> bool:
    """Whether identity and version say that x is unchanged, and what runs is not being transformed or traced."""
    return (
        type(x) is Tensor
        and not x.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not torch.jit.is_tracing()
    )


def _stream(x: Tensor) -> int:
    return int(torch._C._cuda_getCurrentRawStream(x.device.index)) if x.is_cuda else 0
