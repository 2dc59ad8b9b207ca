"""Sampling options through the whole system, against plain transformers with the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch

from moiety.client import Chunk, Client
from moiety.core.sampling import FinishReason
from moiety.errors import InvalidRequest
from moiety.synthetic.tokenizer import EOS
from support.serving import Served
from support.streams import Streams

PROMPT = [9, 8, 7, 6, 5, 40, 41]
NEW_TOKENS = 12
SCHEMA = {
    "type": "object",
    "properties": {"open": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["open", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def reference(tiny: Callable[[str], str]) -> Any:
    """Loads the served checkpoint into plain transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"), dtype=torch.float32, local_files_only=True).eval()


@torch.inference_mode()
def log_softmax(reference: Any, tokens: list[int]) -> torch.Tensor:
    """Returns the reference's log probabilities at each of `tokens`: [tokens, V]."""
    logprobs: torch.Tensor = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs


async def chunks_of(client: Client, **options: Any) -> list[Chunk]:
    """Generates from PROMPT and returns all chunks."""
    return [chunk async for chunk in client.generate(PROMPT, **{"max_tokens": NEW_TOKENS, **options})]


def ids_of(chunks: list[Chunk]) -> list[int]:
    """Returns the tokens of all chunks."""
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_log_probabilities_match_the_reference(served: Served, reference: Any, temperature: float) -> None:
    """Log probabilities of sampled and of likeliest tokens are the log-softmax of plain transformers' logits."""

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        options = {"temperature": temperature, "seed": 3, "top_p": 0.9, "logprobs": True, "top_logprobs": 4}
        chunks = await chunks_of(client, ignore_eos=True, **options)
        tokens = ids_of(chunks)
        expected = log_softmax(reference, PROMPT + tokens)[len(PROMPT) - 1 : -1]
        reported = [value for chunk in chunks for value in chunk.logprobs]
        assert reported == pytest.approx(expected[range(len(tokens)), tokens].tolist(), abs=1e-4)
        for position, top in enumerate(top for chunk in chunks for top in chunk.top_logprobs):
            assert top.token_ids == tuple(expected[position].topk(4).indices.tolist())
            assert top.logprobs == pytest.approx(expected[position].topk(4).values.tolist(), abs=1e-4)

    served.run(scenario)


def test_penalties_match_the_reference(served: Served, reference: Any) -> None:
    """Greedy tokens under a repetition penalty are those of transformers' `generate`."""

    async def scenario(client: Client) -> None:
        ids = torch.tensor([PROMPT])
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.7, **options)
        ours = await chunks_of(client, repetition_penalty=1.7, ignore_eos=True)
        assert ids_of(ours) == theirs[0, len(PROMPT) :].tolist()
        plain = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert not torch.equal(plain, theirs), "the penalty must matter, or this tests nothing"

    served.run(scenario)


def test_stop_strings_stop_ids_and_min_tokens(served: Served) -> None:
    """The text ends before a stop string; a stop id is sent and ends the output; min_tokens delays stop ids and EOS."""

    async def scenario(client: Client) -> None:
        options = {"temperature": 1.0, "seed": 5, "ignore_eos": True, "max_tokens": 24}
        whole = await chunks_of(client, **options)
        text, tokens = "".join(chunk.text for chunk in whole), ids_of(whole)
        middle = len(text) // 2
        stop = text[middle : middle + 3]
        stopped = await chunks_of(client, stop=stop, **options)
        assert "".join(chunk.text for chunk in stopped) == text[: text.index(stop)]
        assert stopped[-1].finish_reason is FinishReason.STOP
        end = tokens[12]
        ended = await chunks_of(client, stop_token_ids=[end], **options)
        assert ids_of(ended) == tokens[: tokens.index(end) + 1]
        assert ended[-1].finish_reason is FinishReason.STOP
        first = await chunks_of(client, stop_token_ids=[tokens[0]], min_tokens=4, **options)
        assert tokens[0] not in ids_of(first)[:4]
        biased = await chunks_of(client, logit_bias={EOS: 100.0}, min_tokens=4)
        assert ids_of(biased)[4:] == [EOS]

    served.run(scenario)


def test_guided_output_matches(served: Served) -> None:
    """A random model writes JSON that fits the schema; a bad guide gives InvalidRequest with the compiler's message."""

    async def scenario(client: Client) -> None:
        options = {"temperature": 1.0, "max_tokens": 400}
        chunks = await chunks_of(client, seed=1, json_schema=SCHEMA, **options)
        assert chunks[-1].finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads("".join(chunk.text for chunk in chunks)), SCHEMA)
        word = await chunks_of(client, regex="(yes|no)", **options)
        assert "".join(chunk.text for chunk in word) in ("yes", "no")
        assert word[-1].finish_reason is FinishReason.STOP
        with pytest.raises(InvalidRequest, match=r"sampling.guide.regex.*unclosed group"):
            await chunks_of(client, regex="(", **options)

    served.run(scenario)


def test_prompt_log_probabilities_match_the_reference(served: Served, reference: Any) -> None:
    """All prompt tokens but the first have log probabilities: sent once, over several prefill chunks, cached or not."""

    async def scenario(client: Client) -> None:
        prompt = [3 + (11 * at) % 300 for at in range(300)]
        expected = log_softmax(reference, prompt)[range(299), prompt[1:]].tolist()
        for _ in range(2):
            chunks = [chunk async for chunk in client.generate(prompt, max_tokens=2, prompt_logprobs=True, n=2)]
            reported = [chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs]
            assert len(reported) == 1
            assert list(reported[0]) == pytest.approx(expected, abs=1e-4)

    served.run(scenario)


def test_choices_do_not_depend_on_each_other(served: Served) -> None:
    """Greedy choices are the same tokens three times; seeded choices differ, and repeat beside other requests."""

    async def choices(client: Client, **options: Any) -> list[list[int]]:
        chunks = await chunks_of(client, n=3, ignore_eos=True, **options)
        assert chunks[-1].completion_tokens == 3 * NEW_TOKENS
        assert sum(bool(chunk.finish_reason) for chunk in chunks) == 3
        return [ids_of([chunk for chunk in chunks if chunk.choice == choice]) for choice in range(3)]

    async def scenario(client: Client) -> None:
        alone = ids_of(await chunks_of(client, ignore_eos=True))
        assert await choices(client) == [alone] * 3
        options = {"temperature": 0.9, "seed": 11}
        first = await choices(client, **options)
        assert len(set(map(tuple, first))) == 3
        assert first[0] == ids_of(await chunks_of(client, ignore_eos=True, **options))
        crowd = Streams(client, NEW_TOKENS)
        assert await choices(client, **options) == first
        await crowd.finish()

    served.run(scenario)
