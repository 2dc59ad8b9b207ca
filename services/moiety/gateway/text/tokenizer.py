"""A checkpoint's tokenizer: text to token ids, ids to text, and what a single token shows. Only the gateway uses it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from moiety.errors import InvalidRequest
from moiety.model.checkpoint.chat_template import ChatTemplate
from moiety.model.checkpoint.tokenizer import TokenKinds, no_tokenizer, open_tokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """What one token shows by itself."""

    text: str  # with replacement characters where the token is part of a character
    bytes: bytes  # the UTF-8 bytes that it stands for; of a special token, those of its name


class Tokenizer:
    """A checkpoint's tokenizer, and the ids that end its generations."""

    def __init__(self, folder: str, *, skip: bool = False):
        """`skip`: the folder's tokenizer is not opened. Then no token has text, and `skipped` says so.

        Raises CheckpointError when the folder has no usable tokenizer.
        """
        self._folder, self.skipped = folder, skip
        self._tokenizer, self.stop_ids = no_tokenizer(folder) if skip else open_tokenizer(folder)
        self.kinds = TokenKinds(self._tokenizer)
        self._tokens: dict[int, Token] = {}
        # transformers' own `decode` does the same for a fast tokenizer, and takes ten times as long.
        if self._tokenizer.is_fast:
            self._decode: Callable[..., str] = self._tokenizer.backend_tokenizer.decode
        else:
            self._decode = partial(self._tokenizer.decode, clean_up_tokenization_spaces=False)

    def require(self, field: str, value: object, instead: str) -> None:
        """Raises InvalidRequest for a `field` that only the tokenizer can serve, where it is skipped."""
        if self.skipped:
            raise InvalidRequest(field, value, f"{instead}: this gateway has no tokenizer (its skip_tokenizer is on)")

    @cached_property
    def longest_token(self) -> int:
        """Most characters of text that one token stands for."""
        return max(map(len, self.vocabulary))

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Returns the token ids of a prompt. `begin`: with the special tokens that the tokenizer puts before a text, if any.

        A rendered chat template has them already.
        """
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=begin)
        return ids

    def token_id(self, token: str) -> int:
        """Returns the id of the token whose text is exactly `token`. Raises InvalidRequest where there is none."""
        found = self.vocabulary.get(token)
        if found is None:
            raise InvalidRequest("sampling.first_token", token, "the text of a token of this model")
        return found

    def special_id(self, text: str) -> int | None:
        """Returns the id of the special token whose text is exactly `text`; None where there is none."""
        found = self.added_tokens.get(text)
        return None if found is None or self.kinds.has_text(found) else found

    @cached_property
    def special_texts(self) -> re.Pattern[str]:
        """Matches the text of a special token; of several, the longest."""
        texts = sorted(filter(lambda text: self.special_id(text) is not None, self.added_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """The id of each token by its name."""
        return dict(self._tokenizer.get_vocab())

    @cached_property
    def added_tokens(self) -> Mapping[str, int]:
        """The id of each token that was added to the vocabulary as a whole, such as a marker of a chat model, by its text."""
        return dict(self._tokenizer.get_added_vocab())

    def chat_template(self) -> ChatTemplate | None:
        """Opens the checkpoint's chat template; None if it has none. Blocks for about a second; raises CheckpointError."""
        return ChatTemplate.open(self._folder, self._tokenizer)

    def token(self, token_id: int) -> Token:
        """Returns what a token shows. Raises InvalidRequest for an id that the tokenizer does not have."""
        if (known := self._tokens.get(token_id)) is None:
            name = self._tokenizer.convert_ids_to_tokens(token_id)
            if name is None:
                raise InvalidRequest("token_ids", token_id, "ids of this model's tokenizer")
            known = self._tokens[token_id] = _token(name, self._decode([token_id], skip_special_tokens=False))
        return known

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Returns the text of `ids`, as transformers decodes it by default: without special tokens, unless `special`.

        transformers' clean-up of spaces, which a tokenizer's config can switch on, is not applied: it would change text
        that has been sent ("is" + " n't" becomes "isn't"), and transformers itself no longer applies it to BPE.
        """
        return self._decode(list(ids), skip_special_tokens=not special)


def _token(name: str, shown: str) -> Token:
    """Returns the token that the vocabulary calls `name` and a decoder shows, by itself, as `shown`.

    The decoder drops the leading space of a text and cannot show a part of a character: the name tells both.
    """
    if name.startswith("<0x") and name.endswith(">") and len(name) == 6:  # SentencePiece: one byte
        return Token(shown, bytes([int(name[3:5], 16)]))
    if "\ufffd" in shown and all(character in _BYTES for character in name):  # byte-level BPE: a part of a character
        return Token(shown, bytes(_BYTES[character] for character in name))
    if name.startswith("▁") and not shown.startswith(" "):
        shown = " " * (len(name) - len(name.lstrip("▁"))) + shown.lstrip(" ")
    return Token(shown, shown.encode())


def _byte_alphabet() -> dict[str, int]:
    """Returns the characters by which byte-level BPE names bytes (GPT-2's alphabet): printable ones name themselves."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()
