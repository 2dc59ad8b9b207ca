"""Simulates a cluster: the real policy, placement and cost model on synthetic load and time."""
