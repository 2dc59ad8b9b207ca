"""Expert weights as they are held in memory, one file per format."""
