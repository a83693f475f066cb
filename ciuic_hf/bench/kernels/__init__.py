"""``ciuic bench kernels``: the GPU kernels proved right, then timed against what else could multiply."""
