"""Checkpoints: their content, where each expert lies, and how routers and expert replicas read their parts."""
