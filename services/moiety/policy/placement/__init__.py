"""Which deployment holds which experts."""
