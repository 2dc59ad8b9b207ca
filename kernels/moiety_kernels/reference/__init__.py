"""Definitions in plain torch, against which every kernel is tested."""
