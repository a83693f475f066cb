"""``CiuicLinear``: ``nn.Linear`` with a compressed weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from ciuic_hf.compressor.adaptive import adaptive_codecs
from ciuic_hf.config import ADAPTIVE, RAW, CompressionIntent, Setting, check_setting
from ciuic_hf.errors import CiuicError
from ciuic_hf.modules.packed import TAGS, PackedModule, adopt
from ciuic_hf.modules.siblings import Siblings
from ciuic_hf.planning.uniform import codec_ids
from ciuic_kernels import BlockGrid, PackedTensor, ops
from ciuic_kernels.format import empty_packed
from ciuic_kernels.layout import FormatError, arena_nbytes
from ciuic_kernels.packing import FLOAT_DTYPES, NotFiniteError, decode_tensor, encode_tensor

WEIGHT = "weight"


class CiuicLinear(PackedModule, nn.Linear):
    """``y = x @ W.T + b`` with W ``[N, K]`` decoded on the fly.

    A subclass of ``nn.Linear``, so PEFT and everything else that looks for one finds it. There are two kinds:

    - Those of a compressed model are compressed in every mode. Gradients flow to the input and a bias, never to
      the weight.
    - One that is constructed (below) trains: W is an ordinary parameter in training mode. ``eval()`` encodes it and
      frees the full weight, ``train()`` decodes it again. Both keep the parameter object, so an optimizer goes on
      with its state; the gradient is dropped. Training goes on from the rounded weight: to evaluate in between
      without rounding, evaluate a ``copy.deepcopy`` (docs/adr/014).

    Args:
        in_features, out_features: K, N.
        bias: whether there is one.
        setting: what the weight becomes in eval mode, as in ``CiuicConfig(modules=...)``.

    Raises:
        CiuicError: for a setting that is none, or a weight too small for it; by ``eval()``, for a weight that is not
            finite.
    """

    trains_weight = False
    setting: Setting
    _requires_grad: bool
    _siblings: tuple[Siblings, int] | None = None  # linears with the same input, and its place among them
    _last: PackedTensor | None = None  # while in training: what the weight was decoded from

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        setting: Setting = CompressionIntent.bits,
    ) -> None:
        setting = check_setting(setting, "setting")
        if setting in (RAW, 16.0):
            raise CiuicError(
                f"A CiuicLinear is compressed in eval mode, got setting={setting!r}; use nn.Linear."
            )
        if (dtype or torch.get_default_dtype()) not in FLOAT_DTYPES:
            raise CiuicError(f"A CiuicLinear needs dtype float32, bfloat16 or float16, got {dtype}.")
        if setting != ADAPTIVE:
            codec_ids((out_features, in_features), setting)  # refuses a matrix that is too small
        super().__init__(in_features, out_features, bias, device, dtype)
        self._declare_packed({WEIGHT: (out_features, in_features)}, self.weight.dtype)
        self.trains_weight, self.setting, self._requires_grad, self._last = True, setting, True, None

    @classmethod
    def adopt(cls, linear: nn.Linear, dtype: torch.dtype | None = None) -> Self:
        """Turn a Linear into a CiuicLinear in place, without a weight; ``set_packed`` installs one."""
        adopt(linear, cls, [WEIGHT], dtype)
        assert isinstance(linear, cls)
        return linear

    @classmethod
    def from_packed(
        cls, packed: PackedTensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> Self:
        """A new module from a compressed ``[N, K]`` weight, compressed in every mode."""
        rows, cols = packed.shape
        linear = nn.Linear(cols, rows, bias=bias is not None, device="meta", dtype=dtype)
        if bias is not None:
            linear.bias = nn.Parameter(bias)
        module = cls.adopt(linear, dtype)
        module.set_packed(WEIGHT, packed)
        return module

    def dense_class(self) -> type[nn.Module]:
        return nn.Linear

    def restore(self, dtype: torch.dtype) -> nn.Module:
        for name in ("trains_weight", "setting", "_requires_grad", "_last", "_siblings"):
            self.__dict__.pop(name, None)
        return super().restore(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K] -> [..., N]`` in the input's dtype."""
        if not self.is_compressed:
            return nn.functional.linear(input, self.weight, self.bias)
        if (
            self._siblings is not None
            and not torch.compiler.is_compiling()
            and self.derived(WEIGHT).work.numel()
        ):
            siblings, place = self._siblings
            output = siblings.output(place, self, input)
            if output is not None:
                return output
        return self.product(input)

    def product(self, input: Tensor) -> Tensor:
        """``forward`` of a compressed weight, apart from its siblings."""
        rows, cols = self.out_features, self.in_features
        return ops.linear(input, self.weight, self.weight_tags, *self.derived(WEIGHT), self.bias, rows, cols)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._siblings is not None:  # a copy: its group is one too, of those that are copied with it
            siblings, place = self._siblings
            siblings.join(place, self)

    def train(self, mode: bool = True) -> Self:
        """Training mode, with the full weight where it was constructed to train; or eval mode, compressed."""
        if self.trains_weight and mode == self.is_compressed:
            if mode:
                self._install_full(self._decoded())
            else:
                weight = self.weight.detach()
                self._install_packed(self._last_if_unchanged(weight) or self._encoded(weight))
        return super().train(mode)

    def _last_if_unchanged(self, weight: Tensor) -> PackedTensor | None:
        """The blocks that the weight came from: encoding decoded values anew would round them once more."""
        last = self._last
        if last is None or last.arena.device != weight.device:
            return None
        return last if torch.equal(decode_tensor(last, weight.dtype), weight) else None

    def _encoded(self, weight: Tensor) -> PackedTensor:
        if weight.dtype not in FLOAT_DTYPES:
            raise CiuicError(
                f"A CiuicLinear compresses float32, bfloat16 and float16, its weight is {weight.dtype}."
            )
        if weight.device.type == "meta" and self.setting != ADAPTIVE:
            grid = BlockGrid(tuple(weight.shape))
            return empty_packed(grid, arena_nbytes(codec_ids(grid.shape, self.setting), grid), "meta")
        try:
            ids = (
                adaptive_codecs(weight)
                if self.setting == ADAPTIVE
                else codec_ids(tuple(weight.shape), self.setting)
            )
            return encode_tensor(weight, ids)
        except NotFiniteError:
            raise CiuicError(
                f"The weight of CiuicLinear({self.in_features}, {self.out_features}) holds NaN or infinity, which "
                "cannot be compressed; training diverged, go back to an earlier checkpoint."
            ) from None

    def _decoded(self) -> Tensor:
        if self.weight.device.type == "meta":
            return torch.empty(self.packed_shapes[WEIGHT], dtype=self.dense_dtype, device="meta")
        return self.dequantize(WEIGHT)

    def _install_packed(self, packed: PackedTensor) -> None:
        """The same parameter object holds the arena, so that an optimizer's reference to it stays good."""
        parameter = self.weight
        self._requires_grad, parameter.grad = parameter.requires_grad, None
        parameter.requires_grad_(False)
        parameter.data = packed.arena
        self.register_parameter(WEIGHT + TAGS, nn.Parameter(packed.tags, requires_grad=False))
        self._last, self._derived = None, {}
        self.prepare()

    def _install_full(self, weight: Tensor) -> None:
        self._last = self.packed(WEIGHT) if weight.device.type != "meta" else None
        del self._parameters[WEIGHT + TAGS]
        self.weight.data = weight
        self.weight.requires_grad_(self._requires_grad)
        self._derived = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._last = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """A weight that was saved in the other mode is converted on the way in."""
        name = prefix + WEIGHT
        if self.trains_weight and name in state_dict:
            try:
                state_dict = self._in_this_mode(dict(state_dict), name)
            except (CiuicError, FormatError) as error:
                errors.append(f"{name}: {error}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _in_this_mode(self, state: dict[str, Any], name: str) -> dict[str, Any]:
        arrives_packed, self._last = name + TAGS in state, None
        if arrives_packed and not self.is_compressed:
            packed = PackedTensor(self.packed_shapes[WEIGHT], state[name], state.pop(name + TAGS))
            state[name] = decode_tensor(packed, self.dense_dtype)
            self._last = PackedTensor(packed.shape, packed.arena.clone(), packed.tags.clone())
        elif self.is_compressed:
            if not arrives_packed:
                packed = self._encoded(state[name])
                state[name], state[name + TAGS] = packed.arena, packed.tags
            # Codecs chosen from other weights or another setting: the arena may have another size.
            self.weight.data = self.weight.data.new_empty(state[name].shape)
        return state

    def extra_repr(self) -> str:
        if self.is_compressed:
            return f"{super().extra_repr()}, {self.packed_repr()}"
        shown = self.setting if isinstance(self.setting, str) else f"{self.setting:g} bits"
        return f"{super().extra_repr()}, training, {shown} in eval"
