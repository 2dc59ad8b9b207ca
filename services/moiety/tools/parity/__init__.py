"""`moiety parity`: the served system against plain transformers."""
