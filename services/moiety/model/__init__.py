"""Checkpoints: what is in them, where each expert lies, and how a router and an expert replica read their parts."""
