"""Guides that force calls compile, and whatever is sampled under them parses into valid calls."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from moiety.errors import FailedPrecondition, InvalidRequest
from moiety.gateway.formats.format import FORMATS, Forcing, Format, Tool
from moiety.gateway.formats.pieces import CallArguments, CallBegins, Content, Piece, Reasoning, joined
from moiety.model.checkpoint.tokenizer import open_tokenizer
from moiety.router.sequence.guides import CompiledGuide, Guides, allowed_tokens
from moiety.synthetic.tokenizer import EOS, write_tokenizer

PROMPT = (9, 10)
CALLING = [name for name, each in FORMATS.items() if each.has_calls]
SPECIAL = (
    *("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    *("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
)
WEATHER = Tool(
    "get_weather",
    "The weather at a place.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "unit": {"enum": ["°C", '"F"'], "description": "Of the temperature. // %json <[9999]>"},
            "description": {"const": {"description": "long"}},
            "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 2},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"day": {"type": "integer", "minimum": 0, "maximum": 9}},
    },
)
TIME = Tool("get", "", {"type": "object", "properties": {"zone": {"enum": ["UTC"]}}, "additionalProperties": False})
NOW = Tool("get_now.utc-0", "", {})
TOOLS = (WEATHER, TIME, NOW)


class Sampler:
    """Samples random tokens under guides, with a tokenizer that has the markers as special tokens or has none of them."""

    def __init__(self, folder: Path, *, special: bool):
        write_tokenizer(folder)
        self._tokenizer, _ = open_tokenizer(str(folder))
        self.special: Mapping[str, int] = {}
        if special:
            self._tokenizer.add_special_tokens({"extra_special_tokens": list(SPECIAL)})
            self._tokenizer.save_pretrained(folder)
            self.special = {marker: self._tokenizer.convert_tokens_to_ids(marker) for marker in SPECIAL}
        self._size = len(self._tokenizer)
        self.guides = Guides(str(folder), self._size, threads=1)

    def sample(self, guide: CompiledGuide, seed: int, tokens: int = 3000) -> str:
        """Returns the text of random allowed tokens up to the end of sequence, with special tokens."""
        matcher, random, generated = guide.matcher(), np.random.default_rng(seed), list[int]()
        for _ in range(tokens):
            matcher.follow(generated)
            allowed, failed = allowed_tokens([matcher], self._size)
            assert not failed, failed
            ids = np.flatnonzero(allowed[0])
            generated.append(EOS if EOS in ids and random.random() < 0.5 else int(random.choice(ids)))
            if generated[-1] == EOS:
                text: str = self._tokenizer.decode(generated[:-1], skip_special_tokens=False)
                return text
        raise AssertionError(f"no end: {self._tokenizer.decode(generated)!r}")

    def accepts(self, guide: CompiledGuide, text: str) -> bool:
        """Returns whether a guide allows exactly this text."""
        matcher, fed = guide.matcher(), list[int]()
        for token in [*self._tokenizer.encode(text, add_special_tokens=False), EOS]:
            allowed, failed = allowed_tokens([matcher], self._size)
            if failed or not allowed[0][token]:
                return False
            fed.append(token)
            matcher.follow(fed)
        return True


@pytest.fixture(params=["special", "text"])
def sampler(request: pytest.FixtureRequest, tmp_path: Path):
    """Returns a sampler for each way in which markers are tokenised."""
    made = Sampler(tmp_path, special=request.param == "special")
    yield made
    made.guides.close()


def pieces(form: Format, text: str, **options: Any) -> list[Piece]:
    """Returns what a parser with tools makes of a text, in parts of 5 characters."""
    numbers = count()
    parser = form.parser(tools=True, new_id=lambda: str(next(numbers)), **options)
    parts = [text[start : start + 5] for start in range(0, len(text), 5)]
    return joined([*(piece for part in parts for piece in parser.push(part)), *parser.end()])


def checked(found: list[Piece]) -> list[str]:
    """Checks that the pieces are calls with valid arguments and nothing else; returns the names."""
    schemas = {tool.name: tool.parameters or {"type": "object", "maxProperties": 0} for tool in TOOLS}
    names: list[str] = []
    for begins, arguments in zip(found[::2], found[1::2], strict=True):
        assert isinstance(begins, CallBegins)
        assert isinstance(arguments, CallArguments)
        jsonschema.validate(json.loads(arguments.text), schemas[begins.name])
        names.append(begins.name)
    return names


@pytest.mark.parametrize("name", CALLING)
async def test_whatever_a_guide_allows_is_calls_with_valid_arguments(sampler: Sampler, name: str):
    """Of any tools, of one tool, and without parallel calls."""
    form = FORMATS[name]
    found: set[str] = set()
    longest = 0
    any_tool = await sampler.guides.compile(form.forced(TOOLS, None, Forcing(sampler.special)), PROMPT)
    for seed in range(12):
        names = checked(pieces(form, sampler.sample(any_tool, seed)))
        assert names
        found.update(names)
        longest = max(longest, len(names))
    assert found == {tool.name for tool in TOOLS}
    assert longest > 1 or name in ("llama", "llama4", "gpt_oss")
    named = await sampler.guides.compile(form.forced(TOOLS, "get", Forcing(sampler.special)), PROMPT)
    single = await sampler.guides.compile(form.forced(TOOLS, None, Forcing(sampler.special, parallel=False)), PROMPT)
    for seed in range(4):
        assert checked(pieces(form, sampler.sample(named, seed))) == ["get"]
        assert len(checked(pieces(form, sampler.sample(single, seed)))) == 1


@pytest.mark.parametrize("name", [name for name in CALLING if not name.startswith("llama")])
async def test_a_guide_can_allow_reasoning(sampler: Sampler, name: str):
    """Reasoning that the output may begin, or that the prompt has begun, comes before the calls."""
    form = FORMATS[name]
    opened = await sampler.guides.compile(
        form.forced(TOOLS, "get", Forcing(sampler.special, reasoning_open=True)), PROMPT
    )
    may = await sampler.guides.compile(form.forced(TOOLS, "get", Forcing(sampler.special, reasoning=True)), PROMPT)
    only = await sampler.guides.compile(form.forced(TOOLS, "get", Forcing(sampler.special)), PROMPT)
    assert checked(pieces(form, sampler.sample(only, 1))) == ["get"]
    # Random text hardly ever ends reasoning, so it is written here, and the matcher says whether it is allowed.
    text = sampler.sample(only, 2)
    opening, closing = {
        "gpt_oss": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        "mistral": ("[THINK]", "[/THINK]"),
        "mistral_args": ("[THINK]", "[/THINK]"),
        "deepseek": ("<think>\n", "</think>\n\n"),
        "deepseek_v31": ("<think>", "</think>"),
        "hermes": ("<think>", "</think>\n\n"),
    }[name]
    assert sampler.accepts(may, f"{opening}Hm.{closing}{text}")
    assert sampler.accepts(may, text)
    assert not sampler.accepts(may, f"Hm.{closing}{text}")
    assert sampler.accepts(opened, f"Hm.{closing}{text}")
    assert not sampler.accepts(opened, text)
    reasoning, *calls = pieces(form, f"{opening}Hm.{closing}{text}")
    assert reasoning == Reasoning("Hm.")
    assert checked(calls) == ["get"]
    assert pieces(form, f"Hm.{closing}{text}", reasoning_open=True)[:1] == [Reasoning("Hm.")]


@pytest.mark.parametrize("name", CALLING)
def test_a_tool_that_is_not_there_is_refused(name: str):
    """The error names what was asked for and what there is."""
    with pytest.raises(InvalidRequest, match=r"^tool_choice = 'other': .* get_weather, get, "):
        FORMATS[name].forced(TOOLS, "other")
    with pytest.raises(InvalidRequest, match=r"^tools = "):
        FORMATS[name].forced((), None)


def test_a_checkpoint_without_calls_cannot_be_forced():
    """The plain format finds no calls and has no guide for any."""
    with pytest.raises(FailedPrecondition, match="unknown"):
        FORMATS["plain"].forced(TOOLS, None)
    assert pieces(FORMATS["plain"], '<tool_call>{"name": "f"}') == [Content('<tool_call>{"name": "f"}')]


def test_descriptions_take_no_place_in_a_guide():
    """A guide has a bounded length, and the descriptions of tools are long."""
    text = FORMATS["hermes"].forced(TOOLS, None).text
    assert "temperature" not in text
    assert '"description": {"const": {"description": "long"}}' in text


@pytest.mark.parametrize("name", ["", "a b", 'a"', "x" * 129, "naïve"])
def test_a_name_that_no_format_could_carry_is_refused(name: str):
    """The error names the field and what is allowed."""
    with pytest.raises(InvalidRequest, match=r"^tools\.function\.name = "):
        Tool(name, "", {})
