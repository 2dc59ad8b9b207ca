"""Applies the policies to a running system: reads the load ledger, scales deployments and places experts."""
