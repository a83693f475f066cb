"""Makes PEFT meet compressed models well, without importing peft before the user does (docs/adr/021).

PEFT has one way to give a module type a LoRA layer of its own, a mapping on each ``LoraConfig``, and no way to be
asked before an adapter is injected or merged. So three methods of its ``BaseTuner`` and one function are wrapped, once
peft is imported. Models without compressed modules take the original path.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ciuic_hf.errors import CiuicError
from ciuic_hf.hf.adapters.costs import summed
from ciuic_hf.modules.experts import CiuicExperts
from ciuic_hf.modules.packed import PackedModule
from ciuic_hf.modules.swap import compressed_modules

_TUNERS = "peft.tuners.tuners_utils"
_PREPARE = "peft.utils.other"
_PREPARE_NAME = "prepare_model_for_kbit_training"


def install() -> None:
    """Wrap what has to be wrapped now if peft is imported, else when it is."""
    waiting: dict[str, Callable[[ModuleType], None]] = {_TUNERS: wrap_tuner, _PREPARE: wrap_prepare}
    for name in list(waiting):
        if name in sys.modules:
            waiting.pop(name)(sys.modules[name])
    if waiting and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(waiting))


class _AfterImport(MetaPathFinder):
    """Finds nothing itself; has a function called with each of some modules right after its code ran."""

    def __init__(self, waiting: dict[str, Callable[[ModuleType], None]]) -> None:
        self._waiting = waiting
        self._asking_others: set[str] = set()

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name not in self._waiting or name in self._asking_others:
            return None
        self._asking_others.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking_others.discard(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._loaded(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _loaded(self, module: ModuleType) -> None:
        wrap = self._waiting.pop(module.__name__, None)
        if wrap is not None:
            wrap(module)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


def wrap_tuner(module: ModuleType) -> None:
    """Wrap injecting and merging of ``BaseTuner``, once."""
    tuner: Any = module.BaseTuner
    if getattr(tuner.inject_adapter, "wrapped_by_ciuic", False):
        return
    inject, merge, unload = tuner.inject_adapter, tuner.merge_adapter, tuner._unload_and_optionally_merge

    @wraps(inject)
    def inject_adapter(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if any(
            isinstance(module, PackedModule) for module in model.modules()
        ):  # compressed now or in eval mode
            _prepare_config(self.peft_config[adapter_name], model)
        return inject(self, model, adapter_name, *args, **kwargs)

    @wraps(merge)
    def merge_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_merging(self)
        with summed(unloads=False):
            return merge(self, *args, **kwargs)

    @wraps(unload)
    def _unload_and_optionally_merge(self: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            _refuse_merging(self)
        with summed(unloads=True):
            return unload(self, merge, *args, **kwargs)

    inject_adapter.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    tuner.inject_adapter, tuner.merge_adapter = inject_adapter, merge_adapter
    tuner._unload_and_optionally_merge = _unload_and_optionally_merge


def _is_compressed(model: Any) -> bool:
    return next(compressed_modules(model), None) is not None


def _prepare_config(config: Any, model: Any) -> None:
    """Check what is asked for and name the LoRA layers of compressed modules, beside those that a user named."""
    from ciuic_hf.hf.adapters import checks
    from ciuic_hf.hf.adapters.layers import Embedding, Linear, ParamWrapper  # imports peft
    from ciuic_hf.modules.embedding import CiuicEmbedding
    from ciuic_hf.modules.linear import CiuicLinear

    checks.check_config(config, model)
    if str(getattr(config.peft_type, "value", config.peft_type)) == checks.LORA:
        ours = {CiuicLinear: Linear, CiuicEmbedding: Embedding, CiuicExperts: ParamWrapper}
        named = config._custom_modules or {}
        config._register_custom_module({kind: layer for kind, layer in ours.items() if kind not in named})


def _refuse_merging(tuner: Any) -> None:
    """Raise CiuicError for adapters other than LoRA on compressed weights: PEFT would write over bytes."""
    from ciuic_hf.hf.adapters.checks import LORA

    harmless = (LORA, "LN_TUNING")  # ours, and one that touches norms alone
    for name, config in tuner.peft_config.items():
        method = str(getattr(config.peft_type, "value", config.peft_type))
        if method not in harmless and _is_compressed(tuner.model):
            raise CiuicError(
                f"The adapter {name} ({method}) cannot be merged into compressed weights; keep it beside them, or "
                "add it to model.dequantize()."
            )


def wrap_prepare(module: ModuleType) -> None:
    """Have ``prepare_model_for_kbit_training`` do for compressed models what it does for those it knows."""
    original = getattr(module, _PREPARE_NAME)
    if getattr(original, "wrapped_by_ciuic", False):
        return

    @wraps(original)
    def prepare_model_for_kbit_training(
        model: Any,
        use_gradient_checkpointing: bool = True,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if _is_compressed(model):
            from ciuic_hf.hf.training import prepare_for_training

            return prepare_for_training(model, use_gradient_checkpointing, gradient_checkpointing_kwargs)
        return original(model, use_gradient_checkpointing, gradient_checkpointing_kwargs, *args, **kwargs)

    prepare_model_for_kbit_training.wrapped_by_ciuic = True  # type: ignore[attr-defined]
    for name in (_PREPARE, "peft.utils", "peft"):  # the latter two have copied it if they are imported
        copies = sys.modules.get(name)
        if copies is not None and copies.__dict__.get(_PREPARE_NAME) is original:
            setattr(copies, _PREPARE_NAME, prepare_model_for_kbit_training)
    setattr(module, _PREPARE_NAME, prepare_model_for_kbit_training)
