"""Text to token ids and back, as streams: tokenising, detokenising, stop strings."""
