"""The systems that `moiety bench serve` compares with. These files run in the peers' environments: they never import moiety."""
