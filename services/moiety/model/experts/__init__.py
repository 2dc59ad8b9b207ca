"""The layout of a checkpoint's routed experts, and the reading of one replica's share of them."""
