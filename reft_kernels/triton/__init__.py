"""Triton kernels: device code only. Their launchers are in :mod:`reft_kernels.backends.triton`."""
