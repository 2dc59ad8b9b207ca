"""The trunk: a model without its routed experts, as a router loads and runs it."""
