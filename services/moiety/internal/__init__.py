"""Protocols between the services of one deployment. Clients do not use them."""
