"""The registry and the load ledger; see README.md."""
