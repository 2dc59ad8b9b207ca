"""Reads the load ledger, decides how many replicas each deployment gets, and places experts."""
