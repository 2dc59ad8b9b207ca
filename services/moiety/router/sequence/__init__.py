"""A request inside the engine: its tokens, its part of a step, and what it emits."""
