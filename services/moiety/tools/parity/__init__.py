"""`moiety parity`: compares the served system with plain transformers, token for token."""
