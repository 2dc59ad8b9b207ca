"""Plain torch definitions that every kernel is tested against."""
