"""The peers: systems that Moiety is compared with. Each runs in its own Python environment and does not import moiety."""
