"""Changes to logits before the draw: bias and penalties as transformers and OpenAI define them, and min_tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_support import EOS, logits_of, one, sequence_of
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from moiety.router.sampling.logprobs import prompt_logprobs
from moiety.router.sampling.processors import process
from moiety.router.sequence.sequence import Sequence
from moiety.router.sequence.token_counts import TokenCounts

VOCABULARY = 50
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30)


def processed(logits: torch.Tensor, *sequences: Sequence) -> torch.Tensor:
    """Returns the logits that the draw would see."""
    scores = logits.clone()
    assert process(scores, sequences) == {}
    return scores


@settings(max_examples=25, deadline=None)
@given(prompt=TOKENS, generated=TOKENS, penalty=st.floats(0.1, 10.0))
def test_repetition_penalty_is_transformers(prompt: list[int], generated: list[int], penalty: float):
    """Logits of prompt and output tokens are divided or multiplied by it, as in RepetitionPenaltyLogitsProcessor."""
    logits = logits_of(1)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + generated]), logits.clone())
    ours = processed(logits, sequence_of(prompt, generated, repetition_penalty=penalty))
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=25, deadline=None)
@given(prompt=TOKENS, generated=TOKENS, presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
def test_presence_and_frequency_count_the_output(
    prompt: list[int], generated: list[int], presence: float, frequency: float
):
    """As OpenAI defines them: logit - count x frequency - (count > 0) x presence, over generated tokens."""
    logits, counts = logits_of(2), Counter(generated)
    expected = logits.clone()
    for token, count in counts.items():
        expected[0, token] -= count * frequency + presence
    options = {"presence_penalty": presence, "frequency_penalty": frequency}
    torch.testing.assert_close(processed(logits, sequence_of(prompt, generated, **options)), expected)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.lists(st.integers(0, 300), max_size=70), min_size=1, max_size=5), prompt=TOKENS)
def test_counts_equal_recounting(steps: list[list[int]], prompt: list[int]):
    """Counts that grow in portions of any size equal a full recount."""
    counts, tokens = TokenCounts(), list(prompt)
    for new in steps:
        tokens += new
        counts.follow(tokens, len(prompt))
    output = Counter(tokens[len(prompt) :])
    assert sorted(counts.ids.tolist()) == sorted(set(tokens))
    assert {token: int(n) for token, n in zip(counts.ids, counts.generated, strict=True) if n} == dict(output)


def test_logit_bias_is_added():
    """The bias is added as in transformers' SequenceBiasLogitsProcessor, and before the penalties, as in vLLM."""
    logits, bias = logits_of(3), {4: 2.5, 9: -100.0, 0: 0.125}
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = theirs(torch.tensor([[3, 4]]), logits.clone())
    torch.testing.assert_close(processed(logits, sequence_of(logit_bias=bias)), expected)
    expected = RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[3, 4]]), expected)
    both = processed(logits, sequence_of([3, 4], logit_bias=bias, repetition_penalty=2.0))
    torch.testing.assert_close(both, expected)


@pytest.mark.parametrize("generated", [[], [7], [7, 8, 9]])
def test_nothing_ends_an_output_before_min_tokens(generated: list[int]):
    """End-of-sequence and stop ids are impossible until then, as in transformers' MinNewTokensLength."""
    logits, ends = logits_of(4), [EOS, 17]
    theirs = MinNewTokensLengthLogitsProcessor(2, 3, ends)(torch.tensor([[3, 4, *generated]]), logits.clone())
    ours = processed(logits, sequence_of([3, 4], generated, min_tokens=3, stop_token_ids=(17,)))
    assert torch.equal(ours, theirs)


def test_ignored_ends_stay_possible():
    """With ignore_eos, min_tokens blocks stop ids but not the end-of-sequence id."""
    ours = processed(logits_of(4), sequence_of(min_tokens=3, stop_token_ids=(17,), ignore_eos=True))
    assert ours.isinf().nonzero().tolist() == [[0, 17]]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"logit_bias": {3: 1.0}}, {"min_tokens": 2}], ids=str)
def test_other_rows_are_left_alone(options: dict[str, Any]):
    """Only the row with the parameter changes."""
    logits = logits_of(5, rows=3)
    ours = processed(logits, sequence_of(), sequence_of(**options), sequence_of())
    assert torch.equal(ours[[0, 2]], logits[[0, 2]])
    assert not torch.equal(ours[1], logits[1])


def test_a_strong_bias_decides():
    """+100 makes a token certain, -100 impossible."""
    logits = logits_of(6)
    assert {one(logits, sequence_of(seed=seed, logit_bias={8: 100.0})).token for seed in range(30)} == {8}
    best = int(logits.argmax())
    drawn = {one(logits, sequence_of(seed=seed, logit_bias={best: -100.0})).token for seed in range(30)}
    assert best not in drawn


def test_prompt_log_probabilities_are_the_log_softmax():
    """They equal the log-softmax for more rows than one chunk, in any float dtype."""
    logits = logits_of(7, rows=150)
    following = [(7 * at) % VOCABULARY for at in range(150)]
    expected = logits.log_softmax(-1)[torch.arange(150), following].tolist()
    scores, tops = prompt_logprobs(logits, following, 2)
    assert scores == pytest.approx(expected)
    for row, top in enumerate(tops):
        best = logits[row].log_softmax(-1).topk(2)
        assert list(top.token_ids) == best.indices.tolist()
        assert list(top.logprobs) == pytest.approx(best.values.tolist())
    halves = prompt_logprobs(logits[:70], following[:70])[0] + prompt_logprobs(logits[70:], following[70:])[0]
    assert halves == prompt_logprobs(logits, following)[0]
    assert prompt_logprobs(logits[:0], []) == ([], [])
