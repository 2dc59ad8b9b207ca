"""A cluster on paper: the real policy, placement and cost model, with load and time that are made up."""
