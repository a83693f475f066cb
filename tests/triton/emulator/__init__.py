"""Executes compiled kernels on the CPU, instruction by instruction, and checks every access: ``launch.py`` starts them."""
