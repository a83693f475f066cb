"""What the weights of a model are multiplied with: second moments of the inputs of its matrices, from a calibration.

Of an input x with K features, ``H = E[s x x^T]`` over tokens, where s, the squared gradient at the outputs, says how
much the token matters there. H is kept as a factor F with ``H = F^T F``, so that rounding it to bfloat16 leaves it
without negative eigenvalues: the inputs themselves, ``[T, K]`` times ``sqrt(s / T)``, or where it is smaller the upper
triangle of H's Cholesky factor, row by row in one dimension.

Beside it is kept what rounding leaves of the error, by block of columns. An error in column j costs ``H_jj``; passed on
to later columns it costs ``1 / U_jj^2``, ``H^-1 = U^T U`` (:mod:`ciuic_kernels.rounding`). Which block deserves bits is
a question of the latter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ciuic_hf.errors import CiuicError
from ciuic_kernels.format import BLOCK_COLS
from ciuic_kernels.rounding import DAMPING, feedback_of

PREFIX, SHARES = "moments/", "shares/"
INPUTS = "ciuic-moments"  # in the metadata: parameter, or parameter/expert, -> tensor
_REMEMBERED = (
    2  # k, o, q, v and down, gate, up: sorted by name, another input comes between those that share one
)
BAND = 256  # rows of a triangular factor that are multiplied at a time
_JITTER = 1e-8  # of the mean of the diagonal; what bfloat16 does to the factor is more


@dataclass
class Moments:
    """Second moments of inputs.

    Attributes:
        factors: input -> factor; an input has the name of the first parameter that met it.
        shares: input -> :func:`shares_of` its moments.
        inputs: parameter, or ``parameter/expert``, -> input.
    """

    factors: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def keep(self, name: str, rows: Tensor) -> None:
        """Store the moments of an input, float32 ``[T, K]``, finite and not all zero."""
        self.factors[name] = factor_of(rows)
        self.shares[name] = shares_of(moments_of(self.factors[name]))


def shares_of(moments: Tensor) -> Tensor:
    """Of H ``[K, K]``, damped as in rounding: ``sum 1 / U_jj^2 / sum H_jj`` of each block of columns, ``[kblocks]``."""
    passed_on = feedback_of(moments).diagonal().double().square().reciprocal()
    diagonal = moments.diagonal().double()
    sums = [
        torch.nn.functional.pad(v, (0, -len(v) % BLOCK_COLS)).view(-1, BLOCK_COLS).sum(1)
        for v in (passed_on, diagonal + DAMPING * diagonal.mean())
    ]
    return (sums[0] / sums[1]).float()


def factor_of(rows: Tensor) -> Tensor:
    """The smaller factor of ``rows^T rows``, bfloat16 on the CPU: ``[T, K]`` or ``[K (K + 1) / 2]``.

    Args:
        rows: float32 ``[T, K]``, finite.
    """
    tokens, width = rows.shape
    if 2 * tokens <= width + 1:
        return rows.bfloat16().cpu()
    exact = rows.double()
    moments = exact.T @ exact
    moments.diagonal().add_(_JITTER * moments.diagonal().mean() + torch.finfo(torch.float32).tiny)
    upper = torch.linalg.cholesky(moments, upper=True).bfloat16().cpu()
    return torch.cat([row[i:] for i, row in enumerate(upper)])


def moments_of(factor: Tensor) -> Tensor:
    """H, float32 ``[K, K]``, from what :func:`factor_of` returned."""
    rows = _rows(factor)
    if factor.dim() == 2:
        return rows.T @ rows
    moments = torch.zeros_like(rows)
    for start in range(0, len(rows), BAND):  # nothing left of the diagonal
        band = rows[start : start + BAND, start:]
        moments[start:, start:].addmm_(band.T, band)
    return moments


def _rows(factor: Tensor) -> Tensor:
    """F, float32 ``[R, K]``, from what :func:`factor_of` returned."""
    if factor.dim() == 2:
        return factor.float()
    width = _width(factor.shape)
    rows, end = torch.zeros(width, width), 0
    for i in range(width):
        rows[i, i:] = factor[end : end + width - i]
        end += width - i
    return rows


def _width(shape: torch.Size | list[int]) -> int:
    """K of a factor of this shape."""
    return shape[1] if len(shape) == 2 else (math.isqrt(8 * shape[0] + 1) - 1) // 2


class InputMoments:
    """The moments in a file of ``ciuic calibrate --rounding``, read as they are asked for.

    Raises:
        CiuicError: for a file without moments.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CiuicError(
                f"There is no file {path}; `ciuic calibrate MODEL --rounding --save {path}` makes one."
            )
        try:
            with safe_open(self.path, framework="pt") as file:
                about = (file.metadata() or {}).get(INPUTS)
        except SafetensorError:
            about = None
        if about is None:
            raise CiuicError(
                f"{path} holds no moments of inputs to round by; make it again with `ciuic calibrate MODEL --rounding "
                f"--save {path}`, or give it as sensitivity= alone."
            )
        self._inputs: dict[str, str] = json.loads(about)
        self._feedbacks: dict[str, Tensor] = {}

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CiuicError when the moments are of another model than one with these parameters."""
        names = {key.partition("/")[0]: key for key in self._inputs}
        with safe_open(self.path, framework="pt") as file:
            for name in names.keys() & shapes.keys():
                width = _width(file.get_slice(PREFIX + self._inputs[names[name]]).get_shape())
                if width != shapes[name][-1]:
                    raise CiuicError(
                        f"{self.path} was made with another model: {name} has {shapes[name][-1]} inputs in this one "
                        f"and {width} there; run `ciuic calibrate` on this model."
                    )
        if not names.keys() & shapes.keys():
            raise CiuicError(
                f"{self.path} was made with another model: it knows none of this one's weights, such as "
                f"{next(iter(shapes), 'any')}; run `ciuic calibrate` on this model."
            )

    def factor(self, name: str, index: int) -> Tensor:
        """F, float32 ``[R, K]``, of the inputs of a matrix of which something is known."""
        with safe_open(self.path, framework="pt") as file:
            return _rows(file.get_tensor(f"{PREFIX}{self._key(name, index)}"))

    def share(self, name: str, index: int) -> Tensor | None:
        """:func:`shares_of` the inputs of matrix ``index`` of a parameter; None where nothing is known of it."""
        key = self._key(name, index)
        if key is None:
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(SHARES + key)
        except SafetensorError:
            raise CiuicError(
                f"{self.path} was made by an earlier ciuic_hf; make it again with `ciuic calibrate`."
            ) from None

    def _key(self, name: str, index: int) -> str | None:
        return self._inputs.get(name) or self._inputs.get(f"{name}/{index}")

    def feedback(self, name: str, index: int) -> Tensor | None:
        """How rounding errors of matrix ``index`` of a parameter are passed on; None where nothing is known of it."""
        key = self._key(name, index)
        if key is None:
            return None
        if key not in self._feedbacks:
            with safe_open(self.path, framework="pt") as file:
                moments = moments_of(file.get_tensor(PREFIX + key))
            try:
                found = feedback_of(moments)
            except ValueError:
                raise CiuicError(
                    f"{self.path} is damaged: the moments {key} are not finite; make it again."
                ) from None
            while len(self._feedbacks) >= _REMEMBERED:
                del self._feedbacks[next(iter(self._feedbacks))]
            self._feedbacks[key] = found
        return self._feedbacks[key]
