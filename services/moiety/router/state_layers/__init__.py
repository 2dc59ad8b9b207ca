"""Layers that keep a state per sequence: Mamba, linear attention, convolutions."""
