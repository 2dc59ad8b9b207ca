"""Definitions of expert MLPs, gating and paged attention in plain torch, against which the kernels are tested."""
