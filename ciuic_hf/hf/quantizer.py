"""``CiuicQuantizer``: the hooks of transformers that compress while loading, and report what happened."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from ciuic_hf.checkpoint import TensorHeader, check_files
from ciuic_hf.config import ADAPTIVE
from ciuic_hf.errors import CiuicError
from ciuic_hf.hf import fp8, prefill, resizing, saving
from ciuic_hf.hf.cache import CiuicCache
from ciuic_hf.hf.choosing import choose, describe
from ciuic_hf.hf.config import AUTO, METHOD, CiuicConfig
from ciuic_hf.hf.convert import ENCODERS, streaming_conversions
from ciuic_hf.hf.destination import current_destination
from ciuic_hf.hf.devices import check_max_memory, device_type, explicit_map, free_nbytes
from ciuic_hf.hf.encoder import Encoder, Recipe
from ciuic_hf.hf.reporting import build_report
from ciuic_hf.hf.rounding import Rounding
from ciuic_hf.hf.stored import check_sizes, fit_names
from ciuic_hf.hf.survey import survey
from ciuic_hf.memory import PeakMemory
from ciuic_hf.modules.kernels import compile_kernels
from ciuic_hf.modules.packed import TAGS, PackedModule
from ciuic_hf.modules.siblings import group_siblings
from ciuic_hf.modules.swap import compressed_modules, restore_dense, swap_in
from ciuic_hf.planning.moments import InputMoments
from ciuic_hf.planning.plan import ModelPlan
from ciuic_hf.planning.prefill_chunk import NONE
from ciuic_hf.runtime.cache.rehearsal import CachedAttention
from ciuic_kernels.dispatch import use_triton


@register_quantizer(METHOD)
class CiuicQuantizer(HfQuantizer):
    """Compresses a model while transformers loads it, or loads one that was saved compressed.

    Attributes:
        codec_ids: parameter name -> uint8 ``[strips, kblocks]``, or ``[E, strips, kblocks]`` where experts differ,
            while a model is being compressed.
        destination: where converted parameters go.
        rounding: by a calibration, while a model is being compressed with one.
    """

    def __init__(self, quantization_config: CiuicConfig, **kwargs: Any) -> None:
        saving.install()
        resizing.install()
        config = copy.deepcopy(quantization_config)  # one CiuicConfig can serve many loads
        super().__init__(config, **kwargs)
        source = config.source_quantization
        self.pre_quantized: bool = kwargs.get("pre_quantized", True) and source is None
        if not self.pre_quantized:
            config.parameters, config.kept = {}, {}
        self.fp8_block = fp8.block_size(source) if source is not None else None
        self.codec_ids: dict[str, Tensor] = {}
        self.destination = current_destination()
        self.rounding: Rounding | None = None
        self._dtypes_of_model: dict[str, torch.dtype] = {}
        self._started = time.perf_counter()
        self._peak: PeakMemory | None = None  # while loading; it holds a lock, which deepcopy refuses
        self._on_gpu_kernels = False
        self._sized: tuple[int, int] | None = None  # the memory that bits were chosen for, and weights in it

    def _process_model_before_weight_loading(
        self,
        model: Any,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        device_map: Any = None,
        **_: Any,
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise CiuicError(
                "Compressed weights cannot be split over processes yet (tensor, expert or pipeline parallelism, FSDP); "
                "place whole modules with device_map instead."
            )
        headers = check_files(checkpoint_files or [])
        config = self.quantization_config
        if config.plan is not None and config.cache_bits is None and not self.pre_quantized:
            config.cache_bits = ModelPlan.load(config.plan).settings.get("cache_bits")
        if config.plan is not None and config.prefill_chunk is None and not self.pre_quantized:
            config.prefill_chunk = ModelPlan.load(config.plan).settings.get("prefill_chunk")
        if config.cache_bits is not None:
            CiuicCache(model.config, config.cache_bits)  # refuses a model that has nothing to cache
        prefill.check(model, config)
        with torch.device("cpu"):  # transformers calls this with meta as the default device
            if self.pre_quantized:
                if config.prefill_chunk == NONE:
                    config.prefill_chunk = None
                check_sizes(config, headers)
                config.parameters, config.kept = (
                    fit_names(model, d) for d in (config.parameters, config.kept)
                )
            else:
                self._choose(model, config, dtype, device_map, headers)
        entries = ((name, tuple(e["shape"]), e["arena_nbytes"]) for name, e in config.parameters.items())
        swap_in(model, entries, dtype or torch.get_default_dtype())
        tie_tags(model)
        model._adjust_bias = leave_bias
        self._refuse_missing(model)
        for _name, module in compressed_modules(model):
            module.__dict__["_is_hf_initialized"] = True  # else offloaded arenas would be given random values
        if not self.pre_quantized:
            self._read_as_stored(model)
        self._peak = PeakMemory().start()

    def _choose(
        self,
        model: Any,
        config: CiuicConfig,
        dtype: torch.dtype | None,
        device_map: Any,
        headers: list[TensorHeader],
    ) -> None:
        """Decide what every parameter becomes and write it into the config."""
        places = explicit_map(device_map) if isinstance(config.memory, dict) else None
        if config.memory == AUTO:
            config.memory = free_nbytes(device_map)
        look = partial(survey, model, headers, self.fp8_block)
        choice = choose(model, config, dtype, device=device_type(device_map), device_map=places, survey=look)
        if config.calibration is not None:
            moments = InputMoments(config.calibration)
            moments.check({target.name: target.shape for target in choice.targets})
            self.rounding = Rounding(moments)
        self.codec_ids = {target.name: target.codec_ids for target in choice.targets}
        config.prefill_chunk = choice.run.prefill_chunk
        if isinstance(config.memory, int):
            self._sized = config.memory, choice.weights_nbytes
        config.parameters = describe(choice.targets)
        config.kept = {k.name: k.reason for k in choice.kept}
        if config.memory is not None or config.plan is not None or config.policy == ADAPTIVE:
            config.bits = choice.bits  # what config.json will say was asked for

    def adjust_max_memory(self, max_memory: dict[int | str, int]) -> dict[int | str, int]:
        if self._sized is not None:
            check_max_memory(max_memory, *self._sized)
        return max_memory

    def _read_as_stored(self, model: Any) -> None:
        """Have tensors read in the dtype of the file: weights are rounded once, FP8 and its scales not at all."""
        verbatim = list(self.codec_ids)
        if self.fp8_block is not None:
            verbatim += [
                f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)
            ]
            verbatim += [name for name in self.quantization_config.kept if "experts" in name]
        plan_of_model = model._get_dtype_plan
        plan = dict.fromkeys(_name_patterns(verbatim, [name for name, _ in model.named_parameters()]))

        def dtype_plan(dtype: torch.dtype) -> dict[str, torch.dtype | None]:
            self._dtypes_of_model = plan_of_model(dtype)
            return self._dtypes_of_model | plan

        model._get_dtype_plan = dtype_plan

    def encoder(self, model: nn.Module, name: str) -> Encoder | None:
        """What takes the weights of a parameter as they are read, None for one that is kept."""
        module_name, _, parameter = name.rpartition(".")
        module = model.get_submodule(module_name)
        shape = module.packed_shapes.get(parameter) if isinstance(module, PackedModule) else None
        if shape is None:
            return None
        recipe = Recipe(name, shape, self.codec_ids[name], self.fp8_block, self.rounding)
        return self.destination.encoder(recipe)

    def read_as_stored(self, model: Any, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        """For reading a model without compressing it: in which dtype its tensors are read, None as they are."""
        fused = {name: "" for name, p in model.named_parameters() if p.dim() == 3}
        self.quantization_config.kept = fused
        self._read_as_stored(model)
        plan: dict[str, torch.dtype | None] = model._get_dtype_plan(dtype)
        model.__dict__.pop("_get_dtype_plan")
        return plan

    def dtype_of(self, model: Any, name: str) -> torch.dtype:
        """The dtype in which the model wants a parameter that is kept."""
        planned = (dtype for pattern, dtype in self._dtypes_of_model.items() if pattern in name)
        return next(planned, None) or model.get_parameter(name).dtype

    def _refuse_missing(self, model: Any) -> None:
        """Have the load fail for a compressed weight that no file holds: it would be left uninitialised."""
        move = model._move_missing_keys_from_meta_to_device
        way_out = 'or keep it out of the compression with modules={{"{0}": "raw"}} to start it untrained'

        def move_missing_keys(missing_keys: set[str], *args: Any, **kwargs: Any) -> Any:
            ties: dict[str, str] = model.all_tied_weights_keys
            tied = ties.keys() | {source for name, source in ties.items() if name not in missing_keys}
            for name in self.quantization_config.parameters:
                for absent in {name, name + TAGS} & (set(missing_keys) - tied):
                    raise CiuicError(
                        f"{absent if self.pre_quantized else name} is missing from the files of this checkpoint; "
                        "download them again" + ("." if self.pre_quantized else f", {way_out.format(name)}.")
                    )
            return move(missing_keys, *args, **kwargs)

        model._move_missing_keys_from_meta_to_device = move_missing_keys

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        if self.pre_quantized:
            return weight_conversions
        experts = {name.rpartition(".")[2] for name, e in self._parameters() if len(e["shape"]) == 3}
        return streaming_conversions(weight_conversions, experts, self.fp8_block)

    def _parameters(self) -> Iterable[tuple[str, dict[str, Any]]]:
        return self.quantization_config.parameters.items()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        peak, self._peak = self._peak, None
        assert peak is not None
        peak.stop()
        model.__dict__.pop("_get_dtype_plan", None)
        model.__dict__.pop("_move_missing_keys_from_meta_to_device", None)
        # Ours cannot be reversed and must not be: a compressed model is saved under its own names.
        model._weight_conversions = [
            c for c in model._weight_conversions or [] if not isinstance(c, ENCODERS)
        ]
        self.codec_ids = {}
        for name, module in compressed_modules(model):
            try:
                module.prepare()
            except CiuicError as error:
                raise CiuicError(f"{name}: {error}") from None
        group_siblings(model)
        self._on_gpu_kernels = all(
            use_triton(weight.device)
            for _, module in compressed_modules(model)
            for weight in module.parameters(recurse=False)
        )
        if self._on_gpu_kernels:
            self._compile_kernels(model)
        report = build_report(model, self.quantization_config)
        report.seconds = time.perf_counter() - self._started
        report.peak_nbytes, report.peak_of = peak.nbytes, peak.kind
        report.rounded = self.rounding.summary() if self.rounding else None
        prefill.set_prefill_chunk(model, self.quantization_config)
        report.prompt = prefill.describe(model, self.quantization_config)
        self.rounding = None
        model.ciuic_report = report
        if logging.is_progress_bar_enabled():
            Console(stderr=True).print(report)
        return model

    def _compile_kernels(self, model: Any) -> None:
        """Have the kernels of generation ready: the first token should not wait for a compiler."""
        modules = [module for _, module in compressed_modules(model)]
        if not modules or model.dtype not in (torch.float16, torch.bfloat16):
            return
        started = time.perf_counter()
        routed = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
        count = compile_kernels(modules, model.dtype, routed, attention=self._cached_attention(model))
        if logging.is_progress_bar_enabled():
            seconds = time.perf_counter() - started
            Console(stderr=True).print(
                f"{count} GPU kernels compiled, or found in Triton's cache, in {seconds:.1f} s"
            )

    def _cached_attention(self, model: Any) -> CachedAttention | None:
        """Attention to the cache of ``cache_bits``; that of a model that cannot be sized is compiled when used."""
        bits, text = self.quantization_config.cache_bits, model.config.get_text_config(decoder=True)
        if bits is None:
            return None
        try:
            return CachedAttention.of(text.to_dict(), bits)
        except CiuicError:
            return None

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        if any(p.device.type == "meta" for p in model.parameters()):
            raise CiuicError("This model is offloaded; load it without offloading to dequantize it.")
        # config.dtype is the string "bfloat16" once the config has been saved
        restore_dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.__dict__.pop("_adjust_bias", None)
        model._weight_conversions = None  # from now on it saves under the names of its architecture
        model.__dict__.pop("ciuic_report", None)
        return model

    def is_serializable(self, **_: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile and capture: Triton kernels never wait for the GPU, the reference does."""
        return self._on_gpu_kernels


def tie_tags(model: Any) -> None:
    """Tags of tied weights are tied like the weights."""
    compressed = {f"{name}.{p}" for name, module in compressed_modules(model) for p in module.packed_shapes}
    for name, source in list(model.all_tied_weights_keys.items()):
        if name in compressed and source in compressed:
            model.all_tied_weights_keys[name + TAGS] = source + TAGS


def leave_bias(*_: Any) -> None:
    """Tying pads the bias of a head to the length of its weight, which for an arena is a number of bytes."""


def _name_patterns(names: list[str], all_names: list[str]) -> list[str]:
    """Regular expressions that match exactly ``names`` among ``all_names``, one for all layers where possible."""
    chosen = set(names)
    outside = {_layerless(name) for name in all_names if name not in chosen}
    patterns: dict[str, None] = {}
    for name in names:
        general = _layerless(name)
        patterns[general if general not in outside else f"^{re.escape(name)}$"] = None
    return list(patterns)


def _layerless(name: str) -> str:
    parts = [r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")]
    return "^" + r"\.".join(parts) + "$"
