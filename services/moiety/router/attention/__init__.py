"""Attention over a ragged step and the paged KV cache, one file for each kind."""
