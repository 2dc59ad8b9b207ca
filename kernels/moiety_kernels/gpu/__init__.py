"""Triton kernels for NVIDIA GPUs, Hopper first: experts, permutation, gating, fp8 rows. Importing this needs triton."""
