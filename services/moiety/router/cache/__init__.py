"""The KV cache and the state slots: what they keep, and which sequence holds which block."""
