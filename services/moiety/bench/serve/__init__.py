"""`moiety bench serve`: compares the served system with transformers, vLLM and llama.cpp."""
