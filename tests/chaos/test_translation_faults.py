"""An encoder-decoder served whole: text, target language, choices, and the loss of a router and of an only holder."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from moiety.client import Client
from moiety.errors import InvalidRequest
from moiety.local.cluster import LocalCluster
from moiety.synthetic import write_tiny
from support.streams import PROMPTS, Streams

NEW_TOKENS = 24
STRIKE_AT = 5
FRENCH = 5  # fra_Latn


async def generate(client: Client, prompt: str | Sequence[int], **options: object) -> dict[int, list[int]]:
    """Generates from `prompt` and returns the tokens by choice."""
    choices: dict[int, list[int]] = {}
    async for chunk in client.generate(prompt, max_tokens=8, ignore_eos=True, **options):  # type: ignore[arg-type]
        choices.setdefault(chunk.choice, []).extend(chunk.token_ids)
    return choices


@pytest.mark.slow
async def test_translations_survive_a_router_and_the_only_holder(tmp_path: Path) -> None:
    """A translation survives the loss of its router, and of an only holder: its tokens are those of a run without faults.

    The next router gets prompt and output so far, encodes the prompt and continues the output. About 20 s: it starts its
    own cluster, of another architecture than the session's.
    """
    folder = write_tiny("nllb-moe", tmp_path)
    defaults = {"decoder_start_token_id": 2, "eos_token_id": 2, "forced_bos_token_id": FRENCH}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    async with LocalCluster(str(folder), dtype="float32") as cluster, Client(cluster.address) as client:
        expected = await Streams(client, NEW_TOKENS).finish()
        assert all(tokens[0] == FRENCH for tokens in expected), "the checkpoint forces the first token"
        english = await generate(client, PROMPTS[0], first_token="eng_Latn")
        assert english[0][0] == FRENCH - 1
        assert (await generate(client, PROMPTS[0], first_token=FRENCH - 1)) == english
        with pytest.raises(InvalidRequest, match=r"sampling\.first_token = \'deu_Latn\'"):
            await generate(client, PROMPTS[0], first_token="deu_Latn")
        with pytest.raises(InvalidRequest, match="prompt_logprobs"):
            await generate(client, PROMPTS[0], prompt_logprobs=True)
        with pytest.raises(InvalidRequest, match=r"sampling\.max_tokens = 600: must be 1 to 511"):
            await client.generate(PROMPTS[0], max_tokens=600).__anext__()
        choices = await generate(client, "The experts run where there is room.", n=3)
        assert len(choices) == 3
        assert len(set(map(tuple, choices.values()))) == 1, "greedy choices are alike"

        doomed = cluster.router()
        await cluster.add_router()
        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        doomed.signal(signal.SIGKILL)
        assert await streams.finish() == expected
        await doomed.ended()

        streams = Streams(client, NEW_TOKENS)
        await streams.wait_for_tokens(STRIKE_AT)
        cluster.experts(1)[0].signal(signal.SIGKILL)
        await cluster.add_expert(1)
        assert await streams.finish() == expected
