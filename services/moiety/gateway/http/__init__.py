"""The OpenAI HTTP API: adapters from its requests to the generation core, and from deltas to its answers."""
