"""Streamed text: each character once it is complete, and in the end exactly the decoding of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moiety.errors import CheckpointError
from moiety.gateway.text.detokenizer import Detokenizer
from moiety.gateway.text.tokenizer import Tokenizer
from moiety.synthetic.tokenizer import EOS, VOCABULARY

BYTE_80 = 225  # the token of the byte 0x80, which begins no character
EMOJI = "naïve 👩‍🚀 and 🙂🙃, 漢字"


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int] | None = None) -> list[str]:
    """Returns the pieces of text for a stream of `ids` in portions of `sizes`, 1 by default."""
    detokenizer, pieces, start = Detokenizer(tokenizer), [], 0
    for size in [*(sizes or []), *[1] * len(ids)]:
        end = min(start + size, len(ids))
        pieces.append(detokenizer.push(ids[start:end], last=end == len(ids)))
        if end == len(ids):
            return pieces
        start = end
    return pieces


def test_a_character_is_sent_once_it_is_whole(tokenizer: Tokenizer):
    """An emoji of four one-byte tokens is returned with its fourth token."""
    ids = tokenizer.encode("🙂")
    assert len(ids) == 4, "the tiny tokenizer must split it, or this tests nothing"
    assert streamed(tokenizer, ids) == ["", "", "", "🙂"]


@pytest.mark.parametrize("text", [EMOJI, "plain words. And more, of them!", "  spaces  \n\n around "])
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str):
    """The pieces join to the encoded text, and none holds a replacement character."""
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(
    ids=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40),
    sizes=st.lists(st.integers(1, 5), max_size=40),
)
def test_any_stream_joins_to_the_decoding_of_all(tokenizer: Tokenizer, ids: list[int], sizes: list[int]):
    """For any tokens in any portions, broken characters and special tokens included, pieces join to the whole decoding."""
    assert "".join(streamed(tokenizer, ids, sizes)) == tokenizer.decode(ids)


def test_an_unfinished_character_is_flushed_at_the_end(tokenizer: Tokenizer):
    """A generation cut inside a character ends with a replacement character, as the whole decoding does."""
    assert streamed(tokenizer, tokenizer.encode("🙂")[:2])[-1] == "\ufffd"


class Counting(Tokenizer):
    """Counts the ids that it decodes."""

    decoded = 0

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        self.decoded += len(ids)
        return super().decode(ids, special=special)


@pytest.mark.parametrize("ids", [[BYTE_80], [EOS], [BYTE_80, EOS]], ids=["broken bytes", "special tokens", "both"])
def test_long_runs_without_text_cost_their_length(folder: str, ids: list[int]):
    """Long runs of broken bytes or special tokens take time in proportion to their length, and the text is the same."""
    tokenizer = Counting(folder)
    stream = [*ids * 400, *tokenizer.encode("🙂")]
    assert "".join(streamed(tokenizer, stream)) == Tokenizer.decode(tokenizer, stream)
    tokenizer.decoded = 0
    streamed(tokenizer, stream)
    assert tokenizer.decoded < 60 * len(stream)


def test_end_of_sequence_is_not_text(tokenizer: Tokenizer):
    """The end of sequence is a stop id and adds no text."""
    ids = [*tokenizer.encode("hi"), EOS]
    assert "".join(streamed(tokenizer, ids)) == "hi"
    assert EOS in tokenizer.stop_ids


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    """A folder without a tokenizer raises CheckpointError that names it."""
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer(str(tmp_path))
