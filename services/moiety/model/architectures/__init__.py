"""Architectures: which can be served, what their experts compute, and the code by which some differ from transformers."""
