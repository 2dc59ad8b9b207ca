"""Protocols between the services of one deployment, which clients do not use.

The modules in `v1` are generated: edit protos/moiety/internal/v1/, then run `make proto`.
"""
