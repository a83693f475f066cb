"""The operators on compressed parameters, one file each; importing this package registers them with torch."""

from ciuic_kernels.ops.attend_packed import attend_packed_op as attend_packed
from ciuic_kernels.ops.attend_packed import page_addresses as page_addresses
from ciuic_kernels.ops.dequantize import dequantize_op as dequantize
from ciuic_kernels.ops.embedding import embedding_op as embedding
from ciuic_kernels.ops.expert_low_rank import expert_low_rank_op as expert_low_rank
from ciuic_kernels.ops.experts import expert_linear_op as expert_linear
from ciuic_kernels.ops.linear import linear_op as linear
from ciuic_kernels.ops.linears import linears_op as linears

__all__ = [
    "attend_packed",
    "dequantize",
    "embedding",
    "expert_linear",
    "expert_low_rank",
    "linear",
    "linears",
    "page_addresses",
]
