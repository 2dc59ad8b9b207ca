"""Stop strings that are special tokens, or have some in them, which no text shows."""

from __future__ import annotations

import pytest
from gateway_support import SHAPE, chunks

from moiety.gateway.text.tokenizer import Tokenizer
from moiety.synthetic.tokenizer import PAD, SPECIAL
from moiety.testing import FakeEngine
from support.doors import door_over

STOP = SPECIAL[PAD]


@pytest.mark.parametrize("keep", [False, True], ids=["hidden", "shown"])
async def test_a_special_token_ends_the_text_as_a_stop_string(tokenizer: Tokenizer, keep: bool):
    """The router gets its id beside the request's own; both doors name the string, and the text has no trace of it."""
    engine = FakeEngine("a", SHAPE)
    engine.script = [*tokenizer.encode("an end"), PAD]
    async with door_over(tokenizer, engine) as door:
        body = {"prompt": [5], "stop": [STOP, "zz"], "stop_token_ids": [9], "skip_special_tokens": not keep}
        (choice,) = (await door.post("/v1/completions", **body))["choices"]
        got = await chunks(door.gateway, [5], stop=(STOP, "zz"), stop_token_ids=(9,))
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("an end", "stop", STOP)
    assert ("".join(chunk.text for chunk in got), got[-1].matched_stop) == ("an end", STOP)
    assert [list(request.sampling.stop_token_ids) for request in engine.requests] == [[9, PAD]] * 2


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        (f"{STOP}\nmo", "an end", f"{STOP}\nmo"),
        (f"end{STOP}", "an ", f"end{STOP}"),
        (f"d{STOP}\n{STOP}", "an end\nmore", None),
        (f"{STOP}{STOP}", "an end\nmore", None),
    ],
)
@pytest.mark.parametrize("keep", [False, True], ids=["hidden", "shown"])
async def test_a_special_token_may_be_a_part_of_a_stop_string(
    tokenizer: Tokenizer, keep: bool, stop: str, text: str, reason: str | None
):
    """The text ends before the whole stop string, and has no trace of the token unless it is asked for."""
    engine = FakeEngine("a", SHAPE)
    engine.script = [*tokenizer.encode("an end"), PAD, *tokenizer.encode("\nmore")]
    async with door_over(tokenizer, engine) as door:
        body = {"prompt": [5], "stop": [stop], "skip_special_tokens": not keep, "max_tokens": len(engine.script)}
        (choice,) = (await door.post("/v1/completions", **body))["choices"]
    shown = text.replace("\n", f"{STOP}\n") if keep else text
    assert (choice["text"], choice.get("stop_reason")) == (shown, reason)


@pytest.mark.parametrize("stop", [STOP, f"d{STOP}"])
async def test_other_tokens_may_spell_a_special_one(tokenizer: Tokenizer, stop: str):
    """A model may write a special token as text: the text ends there, too."""
    engine = FakeEngine("a", SHAPE)
    engine.script = [token for part in ("an end", STOP[:2], STOP[2:], "more") for token in tokenizer.encode(part)]
    assert PAD not in engine.script
    async with door_over(tokenizer, engine) as door:
        (choice,) = (await door.post("/v1/completions", prompt=[5], stop=[stop], max_tokens=len(engine.script)))[
            "choices"
        ]
    assert (choice["text"], choice["stop_reason"]) == (f"an end{STOP}".removesuffix(stop), stop)


async def test_only_special_tokens_of_the_model_count(tokenizer: Tokenizer):
    """A stop string that is a plain token, or part of a special one, is searched in the text alone."""
    engine = FakeEngine("a", SHAPE)
    async with door_over(tokenizer, engine) as door:
        await chunks(door.gateway, [5], stop=("a", STOP[:-1]))
    assert not engine.requests[0].sampling.stop_token_ids
