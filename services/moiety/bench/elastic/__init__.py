"""`moiety bench elastic`: a skewed load on a live Ray system, and what its replicas do."""
