"""`moiety chaos`: faults of every kind under streaming load, and what they cost."""
