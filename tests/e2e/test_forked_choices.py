"""Several choices of one prompt, and repeated prompts, through the whole system."""

from __future__ import annotations

from moiety.client import Chunk, Client
from support.serving import Served

PROMPT = list(range(30, 70))  # two blocks of 16 tokens, and 8 more


def test_choices_and_cached_prefixes_change_no_token(served: Served) -> None:
    """Each choice has its own tokens and end; a repeated prompt finds its full blocks cached, for the same tenant only."""

    async def ask(client: Client, tenant: str) -> tuple[dict[int, list[int]], Chunk]:
        tokens: dict[int, list[int]] = {}
        ends = set()
        options = {"n": 3, "temperature": 0.9, "seed": 5, "max_tokens": 8, "ignore_eos": True, "tenant": tenant}
        async for chunk in client.generate(PROMPT, **options):
            tokens.setdefault(chunk.choice, []).extend(chunk.token_ids)
            if chunk.finish_reason is not None:
                assert chunk.choice not in ends
                ends.add(chunk.choice)
        assert ends == {0, 1, 2}
        return tokens, chunk

    async def scenario(client: Client) -> None:
        await served.scale_experts(1, 1)
        answers = [await ask(client, tenant) for tenant in ("one", "one", "two")]
        tokens = answers[0][0]
        assert [len(tokens[choice]) for choice in range(3)] == [8, 8, 8]
        assert len({tuple(choice) for choice in tokens.values()}) == 3
        assert all(again == tokens for again, _ in answers)
        assert [last.cached_tokens for _, last in answers] == [0, 32, 0]
        assert [last.completion_tokens for _, last in answers] == [24, 24, 24]

    served.run(scenario)
