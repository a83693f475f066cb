"""Ciuic: transformers models loaded straight into compressed blocks.

Importing this package registers the ``ciuic`` quantization method with transformers.

    import ciuic_hf
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=ciuic_hf.CiuicConfig(bits=4.25))
"""

from ciuic_hf.errors import CiuicError as CiuicError
from ciuic_hf.hf import merge as _merge
from ciuic_hf.hf.config import CiuicConfig as CiuicConfig
from ciuic_hf.hf.quantizer import CiuicQuantizer as CiuicQuantizer
from ciuic_hf.modules.embedding import CiuicEmbedding as CiuicEmbedding
from ciuic_hf.modules.experts import CiuicExperts as CiuicExperts
from ciuic_hf.modules.linear import CiuicLinear as CiuicLinear
from ciuic_hf.report import Report as Report

__version__ = "0.1.0"

_merge.install()
