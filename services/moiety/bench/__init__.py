"""The measurements behind the `moiety bench` commands."""
