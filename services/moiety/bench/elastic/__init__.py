"""`moiety bench elastic`: a skewed load on a live Ray system."""
