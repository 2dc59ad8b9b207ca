"""The KV cache and the state slots: what they keep, and who holds which block."""
