"""The router: attention, gating, cache, scheduling, sampling, and the hop to the experts."""
