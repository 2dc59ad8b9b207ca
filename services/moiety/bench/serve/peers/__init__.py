"""The systems that `moiety bench serve` compares with. They run in the peers' environments and do not import moiety."""
