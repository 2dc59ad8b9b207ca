"""Reads traces: an OTLP receiver in memory, a trace as a tree, and the waterfall that `moiety demo` prints."""
