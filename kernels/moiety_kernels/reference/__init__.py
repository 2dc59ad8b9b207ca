"""Expert MLPs, gating and paged attention defined in plain torch: their kernels are tested against these definitions."""
