"""A conversation: its turns, which of them still fit into the context, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moiety.errors import InvalidRequest

CHARACTERS_PER_TOKEN = 3  # cautious: of English text, a token has about 4
ROLES = ("user", "assistant")  # of the turns, alternating


@dataclass(slots=True)
class Turn:
    """A message of the user, and the reply to it."""

    message: str
    reply: str
    tokens: int  # how many tokens it adds to the context

    @classmethod
    def estimated(cls, message: str, reply: str) -> Turn:
        """Returns a turn whose size is a guess from its characters."""
        return cls(message, reply, tokens_of(message) + tokens_of(reply))


class Conversation:
    """What was said. Turns that no longer fit into the context are not sent, but stay here and in the file."""

    def __init__(self, system: str | None = None):
        self.system = system
        self.turns: list[Turn] = []
        self.dropped = 0  # the oldest turns, which are not sent

    @property
    def sent(self) -> list[Turn]:
        """The turns that are part of the next prompt."""
        return self.turns[self.dropped :]

    @property
    def tokens(self) -> int:
        """About how many tokens of the context `sent` takes; the first turn's share includes the system message."""
        return sum(turn.tokens for turn in self.sent)

    def prompt(self, message: str) -> list[dict[str, str]]:
        """Returns the messages that ask for a reply to `message`."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.sent:
            messages += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.reply}]
        return [*messages, {"role": "user", "content": message}]

    def add(self, message: str, reply: str, context_tokens: int) -> None:
        """Adds a turn, after which the context holds `context_tokens`."""
        self.turns.append(Turn(message, reply, max(context_tokens - self.tokens, 1)))

    def drop_oldest(self) -> bool:
        """Leaves one more turn out of the prompt; returns whether there was one."""
        if not self.sent:
            return False
        self.dropped += 1
        return True

    def make_room(self, message: str, max_context: int, reply_tokens: int) -> None:
        """Drops the oldest turns until, as far as can be estimated, `message` and a reply of `reply_tokens` fit."""
        wanted = tokens_of(message) + reply_tokens
        while self.tokens + wanted > max_context and self.drop_oldest():
            pass

    def undo(self) -> Turn | None:
        """Removes the last turn and returns it. Older turns that were dropped get another chance to fit."""
        self.dropped = 0
        return self.turns.pop() if self.turns else None

    def save(self, file: Path) -> None:
        """Writes all messages as JSON, in the form of OpenAI's API. Raises OSError."""
        whole = Conversation(self.system)
        whole.turns = self.turns
        text = json.dumps(whole.prompt("")[:-1], indent=2, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Conversation:
        """Reads what `save` writes. Raises OSError, and InvalidRequest for a file of another form."""
        try:
            messages = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidRequest(str(file), "", f"JSON ({error})") from None
        bound = "a list of messages with role and content: a system message or none, then user and assistant in turn"
        if not isinstance(messages, list) or not all(map(_is_message, messages)):
            raise InvalidRequest(str(file), messages, bound)
        loaded = cls(messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None)
        texts = [message["content"] for message in messages]
        if [message["role"] for message in messages] != [*ROLES] * (len(messages) // 2):
            raise InvalidRequest(str(file), [message["role"] for message in messages], bound)
        loaded.turns = [Turn.estimated(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        return loaded


def tokens_of(text: str) -> int:
    """Returns an estimate of how many tokens a text has."""
    return len(text) // CHARACTERS_PER_TOKEN + 1


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))
