"""`moiety bench serve`: the served system beside transformers, vLLM and llama.cpp."""
