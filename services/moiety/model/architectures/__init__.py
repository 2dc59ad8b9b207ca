"""Which architectures can be served, and the code that a few of them need."""
