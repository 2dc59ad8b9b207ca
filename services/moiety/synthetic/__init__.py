"""Random checkpoints in the layouts that publishers ship: small for tests; overrides make them large for benchmarks."""

from moiety.synthetic.catalogue import TINY, TinyModel, tiny_model, tiny_names
from moiety.synthetic.write import write_tiny

__all__ = ["TINY", "TinyModel", "tiny_model", "tiny_names", "write_tiny"]
