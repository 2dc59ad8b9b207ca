"""What the `moiety bench` commands measure."""
