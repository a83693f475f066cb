"""Ciuic: transformers models loaded straight into compressed blocks.

Importing this package registers the ``ciuic`` quantization method with transformers.

    import ciuic_hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=ciuic_hf.CiuicConfig(bits=4.25))
"""

from ciuic_hf import packaged as _packaged
from ciuic_hf.compressor.adaptive import adaptive_compress as adaptive_compress
from ciuic_hf.compressor.compressed import CompressedTensor as CompressedTensor
from ciuic_hf.compressor.compressor import CiuicCompressor as CiuicCompressor
from ciuic_hf.errors import CiuicError as CiuicError
from ciuic_hf.hf import merge as _merge
from ciuic_hf.hf.adapters import hooks as _adapters
from ciuic_hf.hf.apply import apply_ciuic_compression as apply_ciuic_compression
from ciuic_hf.hf.cache import CiuicCache as CiuicCache
from ciuic_hf.hf.cache import use_ciuic_attention as use_ciuic_attention
from ciuic_hf.hf.config import CiuicConfig as CiuicConfig
from ciuic_hf.hf.quantizer import CiuicQuantizer as CiuicQuantizer
from ciuic_hf.hf.training import prepare_for_training as prepare_for_training
from ciuic_hf.memory_calculator import MemoryCalculator as MemoryCalculator
from ciuic_hf.modules.embedding import CiuicEmbedding as CiuicEmbedding
from ciuic_hf.modules.experts import CiuicExperts as CiuicExperts
from ciuic_hf.modules.linear import CiuicLinear as CiuicLinear
from ciuic_hf.report import Report as Report
from ciuic_hf.runtime.activations import compress_activations as compress_activations
from ciuic_hf.runtime.ddp import compress_communication as compress_communication
from ciuic_hf.runtime.gradients import CompressedGradient as CompressedGradient
from ciuic_hf.runtime.gradients import StochasticCompressor as StochasticCompressor
from ciuic_hf.runtime.gradients import compress_gradients as compress_gradients
from ciuic_hf.runtime.waiting import compress_activation as compress_activation
from ciuic_kernels import tuning as _tuning

__version__ = "0.1.0"

_merge.install()
_adapters.install()
_tuning.add_search_path(_packaged.configs_folder() / "tuned")


def __getattr__(name: str) -> object:
    """``ActivationCompressionCallback`` when it is asked for: a Trainer's callback imports peft and Triton."""
    if name == "ActivationCompressionCallback":
        from ciuic_hf.hf.callbacks import ActivationCompressionCallback

        return ActivationCompressionCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
