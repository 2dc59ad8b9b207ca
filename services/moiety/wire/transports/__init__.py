"""How calls reach an expert replica: gRPC, or shared memory on one node."""
