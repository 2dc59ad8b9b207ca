"""The public API. The modules here are generated: edit protos/moiety/v1/generation.proto, then run `make proto`."""
