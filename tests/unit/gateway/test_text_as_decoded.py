"""Streamed text is what plain transformers' decoding has after the prompt, for every kind of tokenizer and any portions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gateway_support import SHAPE, gateway_over
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from moiety.gateway.text.detokenizer import Detokenizer
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.synthetic.tokenizer import (
    write_nllb_tokenizer,
    write_sentencepiece_tokenizer,
    write_t5_tokenizer,
    write_tokenizer,
    write_wordpiece_tokenizer,
)
from moiety.testing import FakeEngine, fake_token
from moiety.tools.parity.reference_text import reference_text

UNKNOWN_IDS = 3  # ids above the vocabulary, which padded logits can give
Opened = tuple[Tokenizer, Any, st.SearchStrategy[int]]


def opened(folder: Path) -> Opened:
    """Returns Moiety's tokenizer, transformers', and a strategy of ids that prefers the odd ones."""
    plain = AutoTokenizer.from_pretrained(folder)
    odd = [token_id for token, token_id in plain.get_vocab().items() if token[:3] == "<0x" or not token.strip("▁#Ġ")]
    odd += [*plain.all_special_ids, *range(len(plain), len(plain) + UNKNOWN_IDS)]
    wide = [token_id for token, token_id in plain.get_vocab().items() if max(token) > "\u00a0"][:2000]
    ids = st.one_of(st.integers(0, len(plain) - 1), st.sampled_from(odd), st.sampled_from(wide or odd))
    return Tokenizer(str(folder)), plain, ids


@pytest.fixture(
    scope="module",
    params=[
        write_tokenizer,
        write_sentencepiece_tokenizer,
        write_t5_tokenizer,
        write_nllb_tokenizer,
        write_wordpiece_tokenizer,
    ],
    ids=["byte-level BPE", "SentencePiece BPE", "Unigram", "Unigram with languages", "WordPiece"],
)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A tokenizer of each kind."""
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return opened(folder)


def streamed(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], sizes: Sequence[int] = ()) -> str:
    """Returns the joined text of `ids` in portions of `sizes`, and of 1 where these end."""
    detokenizer, pieces, start = Detokenizer(tokenizer, prompt), [], 0
    for size in [*sizes, *[1] * len(ids)]:
        pieces.append(detokenizer.push(ids[start : start + size], last=start + size >= len(ids)))
        start += size
        if start >= len(ids):
            break
    return "".join(pieces)


def check_any_stream(data: st.DataObject, tokenizer: Tokenizer, plain: Any, ids: st.SearchStrategy[int]) -> None:
    """Draws a prompt, an output and portions, and compares the streamed text with transformers'."""
    prompt, output = data.draw(st.lists(ids, max_size=14)), data.draw(st.lists(ids, min_size=1, max_size=30))
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=20))
    assert streamed(tokenizer, prompt, output, sizes) == reference_text(plain, prompt, output)


@given(data=st.data())
def test_any_stream_is_what_decoding_has_after_the_prompt(kind: Opened, data: st.DataObject) -> None:
    """Any prompt, output and portions: special and unknown ids, broken characters and lone spaces included."""
    check_any_stream(data, *kind)


@pytest.mark.parametrize(
    "text", ["def f(x):\n        return x", "  two  spaces", "an expert, naïve 漢字 🙂👩‍🚀 is lost"]
)
def test_a_text_cut_anywhere_joins_again(kind: Opened, text: str) -> None:
    """Prompt and streamed output together are the decoding of the whole text, wherever the output begins."""
    tokenizer, plain, _ = kind
    ids = plain.encode(text, add_special_tokens=False)
    whole = plain.decode(ids, skip_special_tokens=True)
    for cut in range(len(ids)):
        output = streamed(tokenizer, ids[:cut], ids[cut:])
        assert whole.endswith(output)
        assert output == reference_text(plain, ids[:cut], ids[cut:])
    assert streamed(tokenizer, [], ids) == whole


def test_the_space_before_the_first_word_is_kept_after_a_prompt_and_only_there(tmp_path: Path) -> None:
    """Mixtral's kind of tokenizer: after a prompt the first word keeps its space, after nothing but BOS it has none."""
    write_sentencepiece_tokenizer(tmp_path)
    tokenizer, plain, _ = opened(tmp_path)
    prompt, output = plain.encode("x"), plain.encode("run")
    assert plain.decode(prompt + output) == "x run"
    assert streamed(tokenizer, prompt, output) == " run"
    assert streamed(tokenizer, [plain.bos_token_id], output) == "run"


@pytest.mark.parametrize("write", [write_tokenizer, write_sentencepiece_tokenizer])
def test_a_character_that_the_prompt_begins_belongs_to_the_output(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    """A prompt of ids may end inside a character. The output that completes it has all of it."""
    write(tmp_path)
    tokenizer, plain, _ = opened(tmp_path)
    ids = plain.encode("x🙂", add_special_tokens=False)
    for cut in range(1, 4):
        assert streamed(tokenizer, ids[:-cut], ids[-cut:]) == "🙂"


def test_long_runs_of_byte_tokens_cost_their_length(tmp_path: Path) -> None:
    """A run of byte tokens is decoded once, in the prompt and in the output, and one wrong byte changes all of the run."""
    write_sentencepiece_tokenizer(tmp_path)
    tokenizer, plain, _ = opened(tmp_path)
    character = [plain.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "é".encode()]
    decoded = 0

    class Counting(Tokenizer):
        def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
            nonlocal decoded
            decoded += len(ids)
            return super().decode(ids, special=special)

    run = character * 1000
    assert streamed(Counting(str(tmp_path)), run, run) == "é" * 1000
    assert decoded < 4 * len(run)
    assert streamed(tokenizer, [], [*run, character[0]]) == "\ufffd" * (len(run) + 1)


def mistral_file(name: str) -> Path:
    """Returns a tokenizer file of the installed package mistral-common; skips the test where it is not installed."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mistral-common is not installed, whose wheel has published tokenizers")
    return Path(found.submodule_search_locations[0], "data", name)


def write_published_sentencepiece(file: Path, folder: Path) -> None:
    """Saves the pieces of a SentencePiece model as Mixtral's tokenizer.json has them; without merges, it only decodes."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto.FromString(file.read_bytes())
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_published_tekken(file: Path, folder: Path) -> None:
    """Saves the tokens of a tekken file as byte-level BPE; without merges, it only decodes."""
    import base64

    characters = bytes_to_unicode()
    tokens = json.loads(file.read_text(encoding="utf-8"))["vocab"]
    vocabulary = {
        "".join(characters[byte] for byte in base64.b64decode(token["token_bytes"])): token["rank"] for token in tokens
    }
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(
    scope="module",
    params=[
        partial(write_published_sentencepiece, "tokenizer.model.v1"),
        partial(write_published_sentencepiece, "mistral_instruct_tokenizer_241114.model.v7"),
        partial(write_published_tekken, "tekken_240911.json"),
    ],
    ids=["SentencePiece v1", "SentencePiece v7", "tekken"],
)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A published tokenizer."""
    write: Callable[[Path, Path], None] = request.param.func
    file, folder = mistral_file(request.param.args[0]), tmp_path_factory.mktemp("published")
    write(file, folder)
    return opened(folder)


@given(data=st.data())
def test_any_stream_of_a_published_tokenizer(published: Opened, data: st.DataObject) -> None:
    """The same holds for tokenizers as they are published, whose vocabularies have more odd tokens."""
    check_any_stream(data, *published)


@pytest.mark.parametrize("encoder_decoder", [False, True])
async def test_output_continues_the_prompt_but_not_an_encoders(tmp_path: Path, encoder_decoder: bool) -> None:
    """Through a gateway, a decoder's first word keeps its space; an encoder-decoder's output is a text of its own."""
    write_sentencepiece_tokenizer(tmp_path)
    tokenizer, plain, _ = opened(tmp_path)
    words = [token_id for token, token_id in plain.get_vocab().items() if token[:1] == "▁"]
    # The fake engine's tokens depend on the prompt's: this prompt's first token begins a word.
    prompt = next([i] for i in range(3, SHAPE.vocabulary) if fake_token([i], 0, 0, SHAPE.vocabulary, 0) in words)
    async with gateway_over(tokenizer, FakeEngine("a", SHAPE, encoder_decoder=encoder_decoder)) as gateway:
        got = [chunk async for chunk in gateway.client.generate(prompt, max_tokens=8, seed=0)]
    output = [token for chunk in got for token in chunk.token_ids]
    text = "".join(chunk.text for chunk in got)
    assert text == reference_text(plain, [] if encoder_decoder else prompt, output)
    assert text.startswith(" ") is not encoder_decoder
