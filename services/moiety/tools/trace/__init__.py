"""Receives and prints traces: an OTLP receiver in memory, a trace as a tree, and the waterfall of `moiety demo`."""
