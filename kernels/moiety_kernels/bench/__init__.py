"""Checks and measures the GPU kernels: `python -m moiety_kernels.bench`. Needs torch and triton, nothing else."""
