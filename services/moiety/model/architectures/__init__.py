"""The architectures that can be served, and the code that some of them need."""
