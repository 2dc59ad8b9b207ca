"""`moiety bench elastic`: a skewed load on a live Ray system, and how the numbers of replicas follow it."""
