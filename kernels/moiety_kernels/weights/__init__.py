"""Expert weights in memory: one file per quantised format, and what they share."""
