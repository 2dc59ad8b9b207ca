"""Trains the example model: a small Qwen3-MoE whose experts specialise. Run `python -m moiety.training --help`."""
