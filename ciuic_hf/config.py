"""What the user wants: bits per weight for the model, for roles and for single modules.

A *role* is what a weight does in the model: ``embeddings``, ``lm_head``, ``attention``, ``mlp``,
``shared_experts``, ``experts``, and ``linear`` for every Linear that has no role of its own (as a setting,
``linear`` also covers attention, mlp and shared_experts unless they are set themselves).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field

from ciuic_hf.errors import CiuicError
from ciuic_kernels import codec_by_name
from ciuic_kernels.codecs.grid import PLANES
from ciuic_kernels.codecs.sparse import CAPACITIES, CAPACITY_UNIT
from ciuic_kernels.format import ceil_div

ROLES = ("linear", "attention", "mlp", "shared_experts", "experts", "embeddings", "lm_head")
LINEAR_ROLES = ("linear", "attention", "mlp", "shared_experts")
MIN_BITS, MAX_BITS = 1.0, 16.0
POLICIES = ("rate-distortion", "uniform", "adaptive")
TABLE_BITS = 8.0  # embeddings and lm_head unless told: the cheapest quality in a model (docs/adr/002)
RAW, ADAPTIVE = "raw", "adaptive"
QUANT = {f"quant{width}": f"grid{width}_g32" for width in PLANES}
SPARSE = "sparse"
SPARSE_PERCENT, SPARSE_WIDTH = 50, 4  # of "sparse": what is kept of each block, and its bits

Setting = float | str
"""Bits per weight with everything counted, the name of a codec, ``"adaptive"``, or ``"raw"`` to leave the weights as
they are. ``"quant4"`` is another name for ``"grid4_g32"``, and so for every width of the grid. ``"sparse30"`` prunes:
of each block the 30 % of largest magnitude are kept, in 4 bits; ``"sparse"`` alone keeps 50 %."""


def check_setting(value: object, where: str) -> Setting:
    """A valid setting with shorthands spelled out, or CiuicError naming ``where``."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise CiuicError(f"{where} must be bits per weight or the name of a codec or policy, got {value!r}.")
    if isinstance(value, str):
        return value if value in (RAW, ADAPTIVE) else _codec_name(value, where)
    if not MIN_BITS <= value <= MAX_BITS:
        raise CiuicError(
            f"{where} must be between {MIN_BITS:g} and {MAX_BITS:g} bits per weight, got {value}."
        )
    return float(value)


def _codec_name(value: str, where: str) -> str:
    """The codec that a word stands for. Raises CiuicError with the words there are."""
    if value in QUANT:
        return QUANT[value]
    if value == SPARSE or (value.startswith(SPARSE) and value.removeprefix(SPARSE).isdecimal()):
        return _sparse_codec(int(value.removeprefix(SPARSE) or SPARSE_PERCENT), where)
    try:
        return codec_by_name(value).name
    except ValueError as error:
        words = ", ".join([*QUANT, SPARSE, f"{SPARSE}<percent kept>", ADAPTIVE])
        raise CiuicError(
            f"{where} is {value!r}; give bits per weight as a number, {RAW}, which leaves the weights as they are, or "
            f"one of {words}. {error}"
        ) from None


def _sparse_codec(percent: int, where: str) -> str:
    """The codec that keeps at least this share of every block."""
    largest = 100 * max(CAPACITIES) / CAPACITY_UNIT
    if not 0 < percent <= largest:
        raise CiuicError(
            f"{where} keeps {percent} % of the weights; sparse blocks keep 1 to {largest:.0f} %. Use "
            f"quant{SPARSE_WIDTH}, which keeps all, or a number of bits."
        )
    return f"{SPARSE}{SPARSE_WIDTH}_d{ceil_div(percent * CAPACITY_UNIT, 100)}"


def check_policy(policy: object) -> str:
    """The name of a policy, or CiuicError."""
    if policy not in POLICIES:
        raise CiuicError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}.")
    return str(policy)


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a name pattern selects a parameter.

    Without ``*`` the pattern must occur in the name and start where a component starts: ``layers.0.`` selects
    ``model.layers.0.mlp...`` but not ``model.layers.10...``. With ``*`` it is a glob on the whole name.
    """
    if "*" in pattern:
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern}" in f".{name}"


@dataclass(frozen=True)
class CompressionIntent:
    """Bits for the whole model and exceptions from it.

    Attributes:
        bits: bits per weight of all Linears and experts, everything stored counted, 1 to 16.
        modules: role or name pattern -> setting. The most specific wins: the longest matching pattern, then the
            role itself, then ``linear``, then ``bits`` (8 for embeddings and lm_head).
    """

    bits: float = 4.25
    modules: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: object = self.bits
        if isinstance(given, bool) or not isinstance(given, int | float):
            raise CiuicError(
                f"bits must be a number such as 4.25, got {given!r}; a codec is named by "
                'modules={"linear": "grid4_g32"}.'
            )
        bits = check_setting(given, "bits")
        object.__setattr__(self, "bits", bits)
        if not isinstance(self.modules, Mapping):
            raise CiuicError(
                f"modules must map roles or name patterns to bits, got {type(self.modules).__name__}."
            )
        checked = {}
        for key, value in self.modules.items():
            if not isinstance(key, str) or not key:
                raise CiuicError(f"A key of modules must be a role or a name pattern, got {key!r}.")
            checked[key] = check_setting(value, f"modules[{key!r}]")
        object.__setattr__(self, "modules", checked)

    @property
    def patterns(self) -> list[str]:
        """The keys of ``modules`` that are not roles."""
        return [key for key in self.modules if key not in ROLES]

    def setting(self, name: str, role: str) -> Setting:
        """What applies to the parameter ``name`` of this role."""
        key = self.key(name, role)
        if key is not None:
            return self.modules[key]
        return TABLE_BITS if role in ("embeddings", "lm_head") else self.bits

    def key(self, name: str, role: str) -> str | None:
        """The key of ``modules`` that decides for a parameter, None where the defaults do."""
        matching = [pattern for pattern in self.patterns if pattern_matches(pattern, name)]
        if matching:
            return max(matching, key=lambda p: (len(p.replace("*", "")), p))
        if role in self.modules:
            return role
        return "linear" if role in LINEAR_ROLES and "linear" in self.modules else None

    def check_used(self, names: list[str]) -> None:
        """Raise CiuicError for a name pattern that selects none of the parameters ``names``."""
        for pattern in self.patterns:
            if not any(pattern_matches(pattern, name) for name in names):
                raise CiuicError(
                    f"modules[{pattern!r}] matches no weight of this model; use a role ({', '.join(ROLES)}) "
                    f"or a part of a name such as {names[0] if names else 'model.layers.0.'!r}."
                )
