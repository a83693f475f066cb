"""The peers that ``ciuic bench quality`` measures, and how a model is given their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ciuic_hf.bench.peers import hqq, kquants, nf4


@dataclass(frozen=True)
class Peer:
    """One format.

    Attributes:
        bits: per weight, everything stored counted.
        roundtrip: weights of any shape -> what they become, same shape and dtype.
    """

    family: str
    name: str
    bits: float
    roundtrip: Callable[[Tensor], Tensor]


PEERS = (
    Peer("NF4", "bitsandbytes NF4", nf4.BITS_PER_WEIGHT, nf4.nf4_roundtrip),
    *(
        Peer(
            "HQQ",
            f"HQQ {width} bits",
            hqq.bits_per_weight(width),
            partial(hqq.hqq_roundtrip, width=width),
        )
        for width in (8, 4, 3, 2)
    ),
    *(
        Peer("GGUF", f"GGUF {name}", kquants.FORMATS[name].bits, partial(kquants.roundtrip, name=name))
        for name in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
    ),
)


def matrices(model: nn.Module, keep: Collection[str] = ("lm_head",)) -> dict[str, Tensor]:
    """The weights that are compared: of every Linear whose last name is not in ``keep``, and fused experts."""
    found: dict[str, Tensor] = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in keep
    }
    return found | {name: p for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name}


@torch.no_grad()
def replace_weights(model: nn.Module, peer: Peer, original: dict[str, Tensor]) -> None:
    """Give ``model`` the values of ``original`` as the peer would store them."""
    for name, parameter in matrices(model).items():
        parameter.copy_(peer.roundtrip(original[name]))
