"""Plans which deployment holds which experts."""
