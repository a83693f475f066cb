"""Numerics of Ciuic: the block format, the codecs and the operators on compressed weights. Needs torch only."""

from ciuic_kernels import codecs as codecs
from ciuic_kernels.codec import all_codecs as all_codecs
from ciuic_kernels.codec import codec_by_id as codec_by_id
from ciuic_kernels.codec import codec_by_name as codec_by_name
from ciuic_kernels.format import FORMAT_VERSION as FORMAT_VERSION
from ciuic_kernels.format import BlockGrid as BlockGrid
from ciuic_kernels.format import PackedTensor as PackedTensor
