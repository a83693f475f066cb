"""Triton kernels on compressed blocks, one file each; only these files import Triton, at their first call."""
