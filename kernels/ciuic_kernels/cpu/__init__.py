"""The CPU implementation: one C file, compiled on first use and called through ctypes."""
