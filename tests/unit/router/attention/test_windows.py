"""Layers with a window or chunk, through the engine against plain transformers, at positions far beyond both."""

from __future__ import annotations

import pytest
from engine_support import finish, submit
from state_support import NEW_TOKENS, engine_on, prompt_of, served, transformers_tokens

from moiety.core.sampling import Sampling

# name -> (window, chunk) of its layers, all of 8 tokens; prompts have up to 40
WINDOWED = {
    "llama4_text": {(None, 8), (None, None)},
    "gpt_oss": {(8, None), (None, None)},
    "cohere2_moe": {(8, None), (None, None)},
    "mimo_v2_flash": {(8, None), (None, None)},
}


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in ("llama4_text", "cohere2_moe") else pytest.param(name, marks=pytest.mark.slow)
        for name in WINDOWED
    ],
)
def test_tokens_far_beyond_a_window_are_those_of_transformers(architecture: str) -> None:
    """Prompts cut inside and at the ends of windows, decoded across them, some preempted: the tokens are transformers'."""
    model, spec = served(architecture)
    assert {(layer.window, layer.chunk) for layer in spec.layers.values()} == WINDOWED[architecture]
    engine = engine_on(model, spec, token_budget=11, blocks=26)
    prompts = [prompt_of(seed, length) for seed, length in enumerate((3, 9, 17, 40, 25, 8, 16))]
    sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
    listeners = [submit(engine, prompt, sampling=sampling)[1] for prompt in prompts]
    finish(engine)
    assert [listener.tokens for listener in listeners] == [
        transformers_tokens(architecture, prompt) for prompt in prompts
    ]
