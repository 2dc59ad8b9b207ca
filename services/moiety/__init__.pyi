"""The types of what `__init__.py` has. An import there, even one for types only, would make every folder depend on `local`."""

from moiety.local.llm import LLM

__all__ = ["LLM", "__version__"]

__version__: str
