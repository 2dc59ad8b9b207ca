"""LocalCluster: the whole system as child processes, without Ray."""
