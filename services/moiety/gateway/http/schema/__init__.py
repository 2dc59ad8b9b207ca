"""The bodies of requests: which fields they have, and of which type."""
