"""Checks and measures the GPU kernels: `python -m moiety_kernels.bench`. Needs only torch and triton."""
