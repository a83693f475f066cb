"""Pages of a compressed cache for these tests: those of the gate of ``ciuic bench kernels``."""

from ciuic_hf.bench.kernels.pages import LATENTS as LATENTS
from ciuic_hf.bench.kernels.pages import Exact as Exact
from ciuic_hf.bench.kernels.pages import Pages as Pages
from ciuic_hf.bench.kernels.pages import Sizes as Sizes
from ciuic_hf.bench.kernels.pages import exact_attention as exact_attention
from ciuic_hf.bench.kernels.pages import pages_of as pages_of
