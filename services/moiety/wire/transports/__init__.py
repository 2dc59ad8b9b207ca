"""Transports that carry calls to an expert replica: gRPC, and shared memory on one node."""
