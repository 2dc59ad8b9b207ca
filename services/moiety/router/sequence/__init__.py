"""One request inside the engine: its tokens, its share of a step, and what it emits."""
