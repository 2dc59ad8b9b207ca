"""Decides which sequences run in the next step, which wait, and when a refused client should retry."""
