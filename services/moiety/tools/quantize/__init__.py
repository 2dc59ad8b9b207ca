"""`moiety quantize`: bits per expert by measured sensitivity."""
