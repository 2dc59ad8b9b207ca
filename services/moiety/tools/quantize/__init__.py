"""`moiety quantize`: chooses each expert's bits by its measured sensitivity, and writes the quantised checkpoint."""
