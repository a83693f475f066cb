"""PEFT's LoRA layers over compressed modules: the forward of PEFT, another merge, and experts of their own.

Imports peft, so it is imported when an adapter is injected and not before.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.adapters.costs import record
from ciuic_hf.modules.experts import CiuicExperts, LowRank
from ciuic_hf.modules.linear import WEIGHT
from ciuic_hf.modules.merging import add_to_packed
from ciuic_hf.modules.packed import PackedModule
from ciuic_kernels import PackedTensor


class _Requantises:
    """Mixin for a LoRA layer: ``merge`` encodes the sum again, ``unmerge`` puts the old blocks back.

    The old blocks are kept while an adapter is merged, in their compressed size, so that ``unmerge`` is exact; several
    adapters are rounded once together.
    """

    parameter_name = WEIGHT
    merged_adapters: list[str]
    _blocks: PackedTensor | None = None
    _bias: Tensor | None = None

    get_base_layer: Any

    def _low_rank(self, adapter: str) -> LowRank | None:
        """The factors of an adapter as ``[E, R, K]`` and ``[E, N, R]`` with E = 1 for a matrix; None without one."""
        raise NotImplementedError

    def _bias_change(self, adapter: str) -> Tensor | None:
        return None

    def _packed_base(self) -> PackedModule | None:
        """The base layer while it is compressed; a CiuicLinear in training or a dequantized model is not."""
        base = self.get_base_layer()
        return base if isinstance(base, PackedModule) and base.is_compressed else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters; what rounding cost is recorded, whether it stays finite is always checked."""
        base = self._packed_base()
        if base is None:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if self._low_rank(name) is not None]
        if not names:
            return
        if getattr(getattr(base, "_hf_hook", None), "offload", False):
            raise CiuicError(
                "Adapters cannot be merged into offloaded compressed weights; load the model without offloading."
            )
        if self.merged_adapters and self._blocks is None:
            raise CiuicError(_OTHER_MODE)
        blocks = self._blocks or base.packed(self.parameter_name)
        merged, cost = add_to_packed(
            blocks, self._change([*self.merged_adapters, *names]), self.parameter_name
        )
        self._merge_bias(base, names)
        base.replace_bytes(self.parameter_name, merged)
        self._blocks = blocks
        self.merged_adapters.extend(names)
        record(names, cost, blocks.arena.numel() + blocks.tags.numel())

    def _change(self, adapters: Sequence[str]) -> Any:
        terms = [term for name in adapters if (term := self._low_rank(name)) is not None]

        @torch.no_grad()
        def change(matrix: int, rows: slice) -> Tensor | None:
            total: Tensor | None = None
            for a, b, scale in terms:
                left = b[matrix, rows].float()
                if not bool(left.any()):  # an expert that was never routed to, or an adapter before training
                    continue
                added = (left @ a[matrix].float()).mul_(scale)
                total = added if total is None else total.add_(added)
            return total

        return change

    def _merge_bias(self, base: nn.Module, names: Sequence[str]) -> None:
        changes = [change for name in names if (change := self._bias_change(name)) is not None]
        bias = getattr(base, "bias", None)
        if not changes:
            return
        if bias is None:
            raise CiuicError("lora_bias=True cannot be merged into a layer without a bias.")
        if self._bias is None:
            self._bias = bias.detach().clone()
        bias.data = (bias.detach().float() + sum(changes)).to(bias.dtype)

    def unmerge(self) -> None:
        """Put back the blocks that were there before merging, bit for bit."""
        if self._blocks is None:
            if self._packed_base() is None or not self.merged_adapters:
                super().unmerge()  # type: ignore[misc]
                return
            raise CiuicError(_OTHER_MODE)
        base = self._packed_base()
        if base is None:
            raise CiuicError(_OTHER_MODE)
        base.replace_bytes(self.parameter_name, self._blocks)
        if self._bias is not None:
            base.get_parameter("bias").data = self._bias.to(base.get_parameter("bias").device)
        self._blocks = self._bias = None
        self.merged_adapters.clear()


_OTHER_MODE = (
    "Adapters were merged while the layer was in its other mode (full weight or compressed); unmerge in the mode in "
    "which they were merged."
)


class Linear(_Requantises, lora.Linear):
    """LoRA on a ``CiuicLinear``."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is not None:
            raise CiuicError(
                f"target_parameters cannot name the weight of a compressed Linear ({kwargs.get('target_name')}); name "
                "the module in target_modules instead."
            )
        if config.fan_in_fan_out:
            warnings.warn("fan_in_fan_out is for Conv1D; it is set to False for CiuicLinear.", stacklevel=2)
            config.fan_in_fan_out = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _low_rank(self, adapter: str) -> LowRank | None:
        if adapter not in self.lora_A:
            return None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return LowRank(a.detach()[None], b.detach()[None], self.scaling[adapter])

    def _bias_change(self, adapter: str) -> Tensor | None:
        bias = self.lora_B[adapter].bias
        return None if bias is None else bias.detach().float() * self.scaling[adapter]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        packed = self._packed_base()
        return device, dtype if packed is None else packed.dense_dtype


class Embedding(_Requantises, lora.Embedding):
    """LoRA on a ``CiuicEmbedding``."""

    def _low_rank(self, adapter: str) -> LowRank | None:
        if adapter not in self.lora_embedding_A:
            return None
        a, b = (
            self.lora_embedding_B[adapter].t(),
            self.lora_embedding_A[adapter].t(),
        )  # the table is its transpose
        return LowRank(a.detach()[None], b.detach()[None], self.scaling[adapter])

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        packed = self._packed_base()
        return device, dtype if packed is None else packed.dense_dtype


class ParamWrapper(_Requantises, PeftParamWrapper):
    """LoRA on one parameter of ``CiuicExperts``: low-rank products beside the compressed ones.

    PEFT's own adds the full ``[E, N, K]`` of ``B A`` to the parameter. The factors here have the same names, shapes
    and meaning, so adapters are exchanged with an uncompressed model. The class keeps PEFT's name because PEFT finds
    wrappers that hold several parameters of a module by it.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        base: Any = base_layer
        while hasattr(base, "base_layer"):  # a wrapper of another parameter of the same module
            base = base.base_layer
        name = kwargs.pop("parameter_name", None)
        assert isinstance(base, CiuicExperts)
        if name not in base.packed_shapes:
            raise CiuicError(
                f"{kwargs.get('target_name')} is not a weight of compressed experts; adapters go on "
                f"target_parameters such as {', '.join(f'mlp.experts.{n}' for n in base.packed_shapes)}."
            )
        super().__init__(base_layer, adapter_name, parameter_name=name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self._packed_base()
        if base is None:
            return super()._get_in_out_features(module)
        experts, rows, cols = base.packed_shapes[self.parameter_name]
        self.num_experts, self._param_ndim = experts, 3
        return rows, cols  # in this order: PEFT swaps them, as it does for an uncompressed [E, N, K]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        base = self._packed_base()
        for factors in (self.lora_A, self.lora_B):
            if base is not None and adapter_name in factors:
                factors[adapter_name].to(base.dense_dtype)

    def _low_rank(self, adapter: str) -> LowRank | None:
        if adapter not in self.lora_A:
            return None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return LowRank(
            a.unflatten(0, (self.num_experts, -1)),
            b.unflatten(1, (-1, self.num_experts)).permute(2, 0, 1),
            self.scaling[adapter],
        )

    def forward(
        self, x: Tensor, *args: Any, low_rank: Mapping[str, Sequence[LowRank]] | None = None, **kwargs: Any
    ) -> Tensor:
        """The experts with this wrapper's adapters and those of the wrappers around it (``low_rank``)."""
        if not isinstance(self.get_base_layer(), CiuicExperts):
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            active = (self._low_rank(name) for name in self.active_adapters)
            terms = [term for term in active if term is not None]
            low_rank = {**(low_rank or {}), self.parameter_name: terms}
        return self.base_layer(x, *args, low_rank=low_rank, **kwargs)
