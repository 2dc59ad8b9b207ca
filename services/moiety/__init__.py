"""Moiety serves Mixture-of-Experts language models as elastic microservices."""

__version__ = "0.1.0"
