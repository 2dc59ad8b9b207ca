"""One file per operation. Each picks the fastest backend that can compute its arguments."""
