"""Triton kernels for NVIDIA GPUs, written for Hopper: experts, permutation, gating, fp8 rows. The modules import triton."""
