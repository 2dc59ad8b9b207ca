"""What a guide can cost: it compiles in bounded time and memory or is refused, and no mask holds up a step for long."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moiety.core.sampling import Guide, GuideKind
from moiety.errors import InvalidRequest, MoietyError, ResourceExhausted
from moiety.router.sequence.guides import CompiledGuide, Guides, allowed_tokens
from moiety.synthetic.tokenizer import VOCABULARY, write_tokenizer

PROMPT = (9, 10)
MASK_S = 0.5  # ten times the worst mask that was found, and a busy machine


@pytest.fixture
def guides(tmp_path: Path) -> Iterator[Guides]:
    """Returns a compiler of guides that has compiled none yet."""
    write_tokenizer(tmp_path)
    made = Guides(str(tmp_path), VOCABULARY, threads=1)
    yield made
    made.close()


def memory() -> int:
    """Returns the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def worst_mask(guide: CompiledGuide, tokens: int) -> float:
    """Follows `guide` over random allowed tokens; returns the seconds that its slowest mask took."""
    matcher, worst, random = guide.matcher(), 0.0, np.random.default_rng(0)
    generated: list[int] = []
    for _ in range(tokens):
        began = time.monotonic()
        matcher.follow(generated)
        allowed, failed = allowed_tokens([matcher], VOCABULARY)
        worst = max(worst, time.monotonic() - began)
        if failed:
            break
        generated.append(int(random.choice(np.flatnonzero(allowed[0]))))
    return worst


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GuideKind.REGEX, "(a{1000}){1000}"),
        (GuideKind.REGEX, "b(a{1000}){1000}"),
        (GuideKind.REGEX, "a{1000000000}"),
        (GuideKind.REGEX, "((((((a{9}){9}){9}){9}){9}){9}){9}"),
        (GuideKind.GRAMMAR, 'start: ("b" "a"{1000}){1000}'),
        (GuideKind.GRAMMAR, "start: " + " ".join(['"a"?'] * 1000)),
        (GuideKind.JSON_SCHEMA, json.dumps({"type": "string", "pattern": "^(a{1000}){1000}$"})),
        (GuideKind.JSON_SCHEMA, json.dumps({"type": "array", "minItems": 1_000_000, "items": {"const": "a"}})),
    ],
)
async def test_no_mask_of_a_guide_holds_up_a_step(guides: Guides, kind: GuideKind, text: str):
    """A guide that forces a million characters costs a step no more time and memory than any other guide."""
    await guides.compile(Guide(GuideKind.REGEX, "warm"), PROMPT)
    before = memory()
    guide = await guides.compile(Guide(kind, text), PROMPT)
    assert worst_mask(guide, 100) < MASK_S
    assert memory() - before < 60 << 20


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GuideKind.GRAMMAR, "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "x"' for i in range(3000)) + '\na3000: "x"'),
        (GuideKind.JSON_SCHEMA, '{"type": "integer", "multipleOf": 99999989}'),
    ],
    ids=["overflows the compiler's stack", "keeps the compiler busy for minutes"],
)
async def test_a_guide_that_breaks_the_compiler_is_refused(guides: Guides, kind: GuideKind, text: str):
    """It is refused with what it would take, every time, and the next guide compiles."""
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="takes more than 1 s, 512 MB or 1 MB of stack to compile"):
            await guides.compile(Guide(kind, text), PROMPT)
    assert worst_mask(await guides.compile(Guide(GuideKind.REGEX, "[ab]+"), PROMPT), 10) < MASK_S


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GuideKind.REGEX, r"[^\x00-\x{10FFFF}]"),
        (GuideKind.JSON_SCHEMA, "false"),
        (GuideKind.JSON_SCHEMA, '{"enum": []}'),
        (GuideKind.JSON_SCHEMA, '{"type": "integer", "minimum": 5, "maximum": 3}'),
        (GuideKind.GRAMMAR, r"start: /[^\x00-\x{10FFFF}]/"),
    ],
)
async def test_a_guide_that_no_output_can_match_is_refused(guides: Guides, kind: GuideKind, text: str):
    """The error says in plain words that no output can match."""
    with pytest.raises(InvalidRequest, match=f"^sampling.guide.{kind} = .*no output can match it"):
        await guides.compile(Guide(kind, text), PROMPT)


async def test_kept_guides_take_the_memory_that_is_counted(guides: Guides):
    """The smallest guides, too, take no more memory than the cache counts for them."""
    await guides.compile(Guide(GuideKind.REGEX, "warm"), PROMPT)
    before = memory()
    kept = [await guides.compile(Guide(GuideKind.REGEX, f"a{number}"), PROMPT) for number in range(200)]
    assert memory() - before < 2 * sum(guide.bytes for guide in kept)


async def test_kept_guides_are_bounded_by_their_memory(guides: Guides, monkeypatch: pytest.MonkeyPatch):
    """A guide is kept while it and later ones take little memory; what its sequences add to it counts."""
    monkeypatch.setattr("moiety.router.sequence.guides.KEPT_BYTES", 1 << 20)
    small = Guide(GuideKind.REGEX, "[ab]{500}")
    kept = await guides.compile(small, PROMPT)
    await guides.compile(Guide(GuideKind.REGEX, "[cd]+"), PROMPT)
    assert await guides.compile(small, PROMPT) is kept
    worst_mask(kept, 100)  # 100 tokens: about 2 MB
    assert kept.bytes > 1 << 20
    await guides.compile(Guide(GuideKind.REGEX, "[ef]+"), PROMPT)
    assert await guides.compile(small, PROMPT) is not kept


@pytest.mark.parametrize("rules", ['start: e\ne: e e | "a" | e e e', 'start: e\ne: e e | "a"'])
async def test_an_ambiguous_grammar_ends_before_it_holds_up_steps(guides: Guides, rules: str) -> None:
    """A grammar whose cost grows with the output ends its own request, also where an output is resumed and followed at once."""
    guide = await guides.compile(Guide(GuideKind.GRAMMAR, rules), PROMPT)
    matcher, generated, failed = guide.matcher(), list[int](), {}
    token = int(np.flatnonzero(allowed_tokens([matcher], VOCABULARY)[0][0])[0])
    while not failed and len(generated) < 3000:
        began = time.thread_time()
        matcher.follow(generated)
        _, failed = allowed_tokens([matcher], VOCABULARY)
        assert time.thread_time() - began < MASK_S
        generated.append(token)
    began = time.thread_time()
    resumed = guide.matcher()
    resumed.follow(generated * 2)
    assert time.thread_time() - began < 2 * MASK_S
    assert resumed.problem() is not None


async def test_many_costly_guides_do_not_add_up(guides: Guides, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs whose guides together hold up a step end, the costliest first; an ordinary one goes on."""
    monkeypatch.setattr("moiety.router.sequence.guides.TOGETHER_S", 0.005)
    costly = await guides.compile(Guide(GuideKind.GRAMMAR, 'start: e\ne: e e | "a" | e e e'), PROMPT)
    ordinary = await guides.compile(Guide(GuideKind.REGEX, "[a-z]*"), PROMPT)
    matchers = [*(costly.matcher() for _ in range(20)), ordinary.matcher()]
    token = int(np.flatnonzero(allowed_tokens(matchers[:1], VOCABULARY)[0][0])[0])
    generated, failed = list[int](), dict[int, MoietyError]()
    while not failed and len(generated) < 1000:
        generated.append(token)
        for matcher in matchers:
            matcher.follow(generated)
        _, failed = allowed_tokens(matchers, VOCABULARY)
    assert failed
    assert all(isinstance(error, ResourceExhausted) for error in failed.values()), failed
    assert len(failed) < len(matchers)
    assert len(matchers) - 1 not in failed
    assert sum(matcher.over_s for index, matcher in enumerate(matchers) if index not in failed) <= 0.005
