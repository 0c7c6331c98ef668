"""Checks of the kernels on a CUDA device."""
