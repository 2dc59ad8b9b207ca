"""A conversation knows what is sent, what fits, and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moiety.errors import InvalidRequest
from moiety.tools.chat.conversation import Conversation


def conversation(turns: int = 3) -> Conversation:
    """Returns a conversation whose turns add 10 tokens each to the context."""
    made = Conversation("Be kind.")
    for turn in range(turns):
        made.add(f"question {turn}", f"answer {turn}", 10 * (turn + 1))
    return made


def test_turns_leave_from_the_oldest_on():
    """As many of the oldest turns are dropped as must be, and the system message stays; /undo gives them another chance."""
    talk = conversation()
    assert (talk.tokens, len(talk.prompt("next"))) == (30, 8)
    talk.make_room("abc", max_context=40, reply_tokens=10)
    assert (talk.dropped, talk.tokens) == (1, 20)
    assert [message["content"] for message in talk.prompt("next")[:2]] == ["Be kind.", "question 1"]
    talk.make_room("x" * 1000, max_context=40, reply_tokens=10)
    assert talk.prompt("next") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "next"},
    ]
    assert not talk.drop_oldest()
    assert talk.undo() is not None
    assert (talk.dropped, len(talk.turns)) == (0, 2)


def test_a_saved_conversation_comes_back(tmp_path: Path):
    """What was saved is read back whole, dropped turns included, with sizes that are estimates."""
    talk = conversation()
    talk.drop_oldest()
    talk.save(tmp_path / "talk.json")
    loaded = Conversation.load(tmp_path / "talk.json")
    assert [(turn.message, turn.reply) for turn in loaded.turns] == [(f"question {n}", f"answer {n}") for n in range(3)]
    assert (loaded.system, loaded.dropped) == ("Be kind.", 0)
    assert loaded.tokens > 0


@pytest.mark.parametrize(
    "content",
    [
        "{",
        {"messages": []},
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "alone"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object):
    """A file that is no such conversation is refused with its name and what it must be."""
    file = tmp_path / "talk.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidRequest, match=r"talk\.json.*must be"):
        Conversation.load(file)
