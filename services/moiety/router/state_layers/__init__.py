"""Layers that keep a state for each sequence: Mamba, linear attention, convolutions."""
