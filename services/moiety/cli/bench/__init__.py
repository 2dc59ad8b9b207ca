"""`moiety bench` and its commands."""
