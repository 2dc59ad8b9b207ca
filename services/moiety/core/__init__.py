"""Value types and protocols that every part shares. No I/O, no clock, no torch at run time."""
