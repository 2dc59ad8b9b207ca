"""The protocols of a router's engine and of an expert replica.

The modules here are generated: edit engine.proto or experts.proto in protos/moiety/internal/v1/, then run `make proto`.
"""
