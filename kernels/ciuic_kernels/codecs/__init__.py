"""The block codecs, one file each. A new codec is one file and one line here."""

from ciuic_kernels.codecs import grid as grid
from ciuic_kernels.codecs import raw16 as raw16
from ciuic_kernels.codecs import sparse as sparse
from ciuic_kernels.codecs import zero as zero
