"""Guided output matches its guide whatever the logits, ends only where the guide allows, and bad guides are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import pytest
import torch
from sampling_support import logits_of, one, sampled, sequence_of

from moiety.core.sampling import Guide, GuideKind
from moiety.errors import FailedPrecondition, InvalidRequest, MoietyError
from moiety.gateway.text.detokenizer import Detokenizer
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.router.sampling.sampler import sample
from moiety.router.sequence.guides import CompiledGuide, Guides, allowed_tokens
from moiety.router.sequence.sequence import Sequence
from moiety.synthetic.tokenizer import (
    BOS,
    EOS,
    VOCABULARY,
    write_sentencepiece_tokenizer,
    write_t5_tokenizer,
    write_tokenizer,
    write_wordpiece_tokenizer,
)

PROMPT = (9, 10)
PADDED = VOCABULARY + 13  # models often have more logits than their tokenizer has tokens
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
    },
    "required": ["name", "size", "parts"],
    "additionalProperties": False,
}
GRAMMAR = """
start: sum
sum: product ("+" product)*
product: NUMBER ("*" NUMBER)*
NUMBER: /[1-9][0-9]?/
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a folder with the tiny tokenizer."""
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return str(made)


@pytest.fixture(scope="module")
def guides(folder: str) -> Iterator[Guides]:
    """Returns a compiler of guides for the tiny tokenizer."""
    made = Guides(folder, PADDED, threads=1)
    yield made
    made.close()


async def compiled(guides: Guides, kind: GuideKind, text: str) -> CompiledGuide:
    """Returns the compiled guide."""
    return await guides.compile(Guide(kind, text), PROMPT)


def written(guide: CompiledGuide, seed: int, most: int = 300, **options: object) -> list[int]:
    """Returns the output sampled from random logits under `guide`; fails if it has no end within `most` tokens."""
    sequence = sequence_of(seed=seed, guide=Guide(GuideKind.REGEX, "as compiled"), **options)
    sequence.guide = guide
    for position in range(most):
        token = one(logits_of(1000 * seed + position, PADDED), sequence).token
        sequence.tokens.append(token)
        if token in sequence.stop_ids:
            return sequence.tokens[sequence.prompt_tokens :]
    raise AssertionError(f"the output did not end within {most} tokens")


@pytest.mark.parametrize("seed", range(6))
async def test_json_matches_its_schema(guides: Guides, folder: str, seed: int):
    """Random logits under a schema give JSON that jsonschema accepts."""
    guide = await compiled(guides, GuideKind.JSON_SCHEMA, json.dumps(SCHEMA))
    text = Tokenizer(folder).decode(written(guide, seed))
    jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("seed", range(4))
async def test_a_regular_expression_matches_all_of_the_output(guides: Guides, folder: str, seed: int):
    """The output matches from its first to its last character, including multi-byte characters."""
    pattern = r"(yes|no|может), [a-f]{3,5} 🙂[0-9]+\."
    tokens = written(await compiled(guides, GuideKind.REGEX, pattern), seed)
    assert tokens[-1] == EOS
    assert re.fullmatch(pattern, Tokenizer(folder).decode(tokens))


@pytest.fixture(
    scope="module",
    params=[write_tokenizer, write_sentencepiece_tokenizer, write_t5_tokenizer],
    ids=["bytes", "bpe", "t5"],
)
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns a folder with a tokenizer of each kind that can be guided."""
    made = tmp_path_factory.mktemp("tokenizer")
    request.param(made)
    return str(made)


@pytest.mark.parametrize("prompt", [(BOS,), PROMPT, ()], ids=["bos", "words", "none"])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GuideKind.REGEX, "(yes|no)"),
        (GuideKind.REGEX, " yes"),
        (GuideKind.REGEX, "  in{1,3}dented at| all"),
        (GuideKind.REGEX, "[a-z]{1,9} [a-z]{1,9}"),
        (GuideKind.GRAMMAR, 'start: " "? "a" B\nB: /[b-d]{2} /'),
        (GuideKind.JSON_SCHEMA, '{"enum": [" yes", "no  way"]}'),
    ],
)
async def test_a_guide_is_about_the_text_that_is_streamed(
    any_folder: str, prompt: tuple[int, ...], kind: GuideKind, text: str
):
    """With every kind of tokenizer, spaces included, the streamed text matches the guide, after a prompt and without one."""
    guides, tokenizer = Guides(any_folder, PADDED, threads=1), Tokenizer(any_folder)
    guide = await guides.compile(Guide(kind, text), prompt)
    for seed in range(3):
        streamed = Detokenizer(tokenizer, prompt).push(written(guide, seed), last=True)
        if kind is GuideKind.JSON_SCHEMA:
            assert json.loads(streamed) in json.loads(text)["enum"]
        else:
            assert re.fullmatch(" ?a[b-d]{2} " if kind is GuideKind.GRAMMAR else text, streamed)
    guides.close()


async def test_a_tokenizer_that_cannot_be_guided_is_refused(tmp_path: Path):
    """The tokens of WordPiece have no text of their own, and a guided request says that the tokenizer is the reason."""
    write_wordpiece_tokenizer(tmp_path)
    guides = Guides(str(tmp_path), PADDED, threads=1)
    with pytest.raises(FailedPrecondition, match=r"not possible with this checkpoint's tokenizer: in WordPiece"):
        await compiled(guides, GuideKind.REGEX, "a")
    guides.close()


@pytest.mark.parametrize("beyond", [0, 2], ids=["added", "others too"])
@pytest.mark.parametrize("write", [write_tokenizer, write_sentencepiece_tokenizer, write_t5_tokenizer])
async def test_tokens_beyond_the_models_vocabulary(tmp_path: Path, write: Callable[[Path], None], beyond: int):
    """A token that was added behind the vocabulary, or any other, leaves guides as they were; a grammar may not name it."""
    write(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    last, file = len(tokenizer.vocabulary), tmp_path / "tokenizer.json"
    vocabulary = last - beyond
    form = json.loads(file.read_text())
    form["added_tokens"].append({**form["added_tokens"][0], "id": last, "content": "[PAD]"})
    file.write_text(json.dumps(form))
    guides = Guides(str(tmp_path), vocabulary, threads=1)
    guide = await compiled(guides, GuideKind.REGEX, "[a-c]{3}")
    allowed, failed = allowed_tokens([guide.matcher()], vocabulary)
    shown = {tokenizer.token(token).text for token in allowed[0].nonzero()[0].tolist()}
    assert shown >= {"a", "b", "c"}
    assert not failed
    with pytest.raises(InvalidRequest, match="grammar"):
        await compiled(guides, GuideKind.GRAMMAR, f"start: <[{vocabulary}]>")
    guides.close()


@pytest.mark.parametrize("schema", ["true", "{}", '{"type": "string"}'])
async def test_the_shortest_schemas(guides: Guides, folder: str, schema: str):
    """Schemas for any JSON value and for a bare string work."""
    sequence = sequence_of(temperature=0.0)
    sequence.guide = await compiled(guides, GuideKind.JSON_SCHEMA, schema)
    for character in '"hi"':
        wants = logits_of(5, PADDED)
        wants[0, Tokenizer(folder).encode(character)[0]] = 50.0
        sequence.tokens.append(one(wants, sequence).token)
    assert json.loads(Tokenizer(folder).decode(sequence.tokens[2:])) == "hi"


async def test_a_grammar_is_followed(guides: Guides, folder: str):
    """The output matches a context-free grammar in Lark syntax."""
    for seed in range(4):
        text = Tokenizer(folder).decode(written(await compiled(guides, GuideKind.GRAMMAR, GRAMMAR), seed))
        assert re.fullmatch(r"[1-9]\d?([+*][1-9]\d?)*", text)


async def test_the_end_comes_only_where_the_guide_is_complete(guides: Guides, folder: str):
    """An end is sampled only where the guide allows it, and before min_tokens only if it allows nothing else."""
    guide = await compiled(guides, GuideKind.REGEX, "abc")
    wants_to_end = torch.zeros(1, PADDED)
    wants_to_end[0, EOS] = 50.0
    sequence = sequence_of(temperature=0.0, min_tokens=50)
    sequence.guide = guide
    for _ in range(4):
        sequence.tokens.append(one(wants_to_end, sequence).token)
    assert sequence.tokens[-1] == EOS
    assert Tokenizer(folder).decode(sequence.tokens[2:]) == "abc"


async def test_resumed_and_forked_outputs_continue_from_their_tokens(guides: Guides):
    """A sequence resumed after generated tokens continues like the original, also with a shared guide."""
    guide = await compiled(guides, GuideKind.JSON_SCHEMA, json.dumps(SCHEMA))
    tokens = written(guide, seed=2)
    for cut in (0, 1, len(tokens) // 2, len(tokens) - 1):
        resumed = sequence_of(generated=tokens[:cut], seed=2)
        resumed.guide = guide
        assert one(logits_of(2000 + cut, PADDED), resumed).token == tokens[cut]


async def test_rows_without_a_guide_beside_rows_with_one(guides: Guides):
    """Each row gets the result of running alone, to the bit, and guides of different rows do not mix."""
    kinds = [(GuideKind.REGEX, "[ab]+"), None, (GuideKind.REGEX, "[0-9]+"), None]

    async def rows() -> list[Sequence]:
        made = [sequence_of(seed=seed, logprobs=True) for seed in range(4)]
        for sequence, kind in zip(made, kinds, strict=True):
            sequence.guide = await compiled(guides, *kind) if kind else None
        return made

    logits = logits_of(3, PADDED, rows=4)
    alone = [one(logits[row : row + 1], sequence) for row, sequence in enumerate(await rows())]
    assert sampled(logits, *await rows()) == alone


async def test_a_guide_that_fails_ends_its_request_alone(guides: Guides):
    """Earlier tokens that the guide does not allow end only that request, with an error."""
    broken, fine = sequence_of(generated=[9, 9, 9]), sequence_of(seed=1)
    broken.guide = await compiled(guides, GuideKind.REGEX, "abc")
    logits = logits_of(4, PADDED, rows=2)
    failed, good = sample(logits, [broken, fine])
    assert isinstance(failed, MoietyError)
    assert "the output cannot follow its guide" in str(failed)
    assert good == one(logits[1:], fine)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (GuideKind.JSON_SCHEMA, "no JSON", "a JSON Schema that compiles"),
        (GuideKind.JSON_SCHEMA, "[1]", "schema must be an object or boolean"),
        (GuideKind.JSON_SCHEMA, '{"type": "objekt"}', "objekt"),
        (GuideKind.JSON_SCHEMA, '{"$ref": "#/nowhere"}', "'/nowhere' does not exist"),
        (GuideKind.REGEX, "(", "unclosed group"),
        (GuideKind.REGEX, "(?=a)b", "look-around"),
        (GuideKind.GRAMMAR, 'start: "a" other', 'unknown name: "other"'),
        (GuideKind.GRAMMAR, 'x: "a"', "no start rule"),
    ],
)
async def test_errors_of_bad_guides_name_field_value_and_problem(
    guides: Guides, kind: GuideKind, text: str, words: str
):
    """The error has the compiler's message in one line of bounded length."""
    with pytest.raises(InvalidRequest) as refused:
        await compiled(guides, kind, text)
    message = str(refused.value)
    assert message.startswith(f"sampling.guide.{kind} = ")
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


async def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path: Path):
    """Without a tokenizer, guided requests get FailedPrecondition."""
    guides = Guides(str(tmp_path), PADDED, threads=1)
    with pytest.raises(FailedPrecondition, match=r"guided output is not possible .*: no tokenizer"):
        await compiled(guides, GuideKind.REGEX, "a")
    guides.close()
