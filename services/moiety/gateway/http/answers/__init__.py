"""The answers of generation requests: from deltas to chunks and whole answers."""
