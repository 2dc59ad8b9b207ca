"""Sends a layer's rows to the expert replicas and collects the results."""
