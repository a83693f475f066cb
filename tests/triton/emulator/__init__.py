"""Executes compiled kernels on the CPU and checks every access: ``launch.py`` starts them."""
