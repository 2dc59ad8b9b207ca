"""Benchmarks that call engines directly: `moiety bench split` and `moiety bench lanes`."""
