"""The public API, generated from protos/moiety/v1: `make proto` writes it."""
