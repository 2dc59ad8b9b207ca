"""Where a checkpoint keeps its routed experts, and how an expert replica reads its share of them."""
