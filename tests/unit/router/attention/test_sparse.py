"""Attention to tokens that an indexer picks, through the engine against plain transformers."""

from __future__ import annotations

import logging

import pytest
from engine_support import finish, submit
from state_support import INDEXED, NEW_TOKENS, engine_on, prompt_of, served, transformers_tokens

from moiety.core.sampling import Sampling

SAMPLING = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
# glm_moe_dsa passes picked tokens from layer to layer; hy_v4 has sinks and no sdpa; axk2 is like DeepSeek's.
SLOW = ("hy_v4", "axk2", "dots3_note_text")


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in INDEXED]
)
def test_picked_tokens_are_those_of_transformers(architecture: str, caplog: pytest.LogCaptureFixture) -> None:
    """With 6 of up to 50 keys picked, chunked, preempted, forked and prefix-cached requests give transformers' tokens."""
    with caplog.at_level(logging.WARNING):
        model, spec = served(architecture)
    count = 2 if architecture == "dots3_note_text" else 4
    assert (
        f"{count} layers attend to tokens that an indexer picks. They run one sequence of a step after another"
        in caplog.text
    )
    engine = engine_on(model, spec, token_budget=11, blocks=26)
    prompts = [prompt_of(seed, length) for seed, length in enumerate((3, 9, 17, 40, 25, 1, 9))]
    listeners = [submit(engine, prompt, sampling=SAMPLING)[1] for prompt in prompts]
    finish(engine)
    _, again = submit(engine, prompts[3], sampling=Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, n=2))
    finish(engine)
    assert [listener.tokens for listener in listeners] == [
        transformers_tokens(architecture, prompt) for prompt in prompts
    ]
    assert again.choices == dict.fromkeys(range(2), transformers_tokens(architecture, prompts[3]))
    assert again.cached_tokens[0] > 0


def test_the_latent_and_the_indexer_keys_are_cached() -> None:
    """DeepSeek-V3.2 caches per layer a latent of 16, a rotated part of 8 and one indexer key of 16 elements."""
    _, spec = served("deepseek_v32")
    assert spec.bytes_per_token == 4 * (16 + 8 + 16) * 4
    assert spec.indexed
