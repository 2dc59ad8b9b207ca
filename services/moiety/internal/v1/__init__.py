"""The engine and expert protocols, generated from protos/moiety/internal/v1: `make proto` writes them."""
