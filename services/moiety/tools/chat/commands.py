"""The commands of a chat that work on the conversation and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from moiety.errors import FailedPrecondition, InvalidRequest
from moiety.tools.chat.conversation import Conversation
from moiety.tools.chat.screen import Screen
from moiety.tools.chat.settings import ChatSettings

COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(  # name -> its argument, and what it does
    {
        "help": ("", "lists the commands"),
        "new": ("", "begins a new conversation with the same system message"),
        "undo": ("", "takes back your last message and its reply"),
        "retry": ("", "asks for another reply to your last message"),
        "system": ("TEXT", "sets the system message; - removes it; without TEXT: shows it"),
        "set": ("NAME VALUE", "sets an option of sampling; without VALUE: takes it back; without NAME: shows them"),
        "save": ("FILE", "writes the conversation to a file, as JSON"),
        "load": ("FILE", "continues the conversation of a file"),
        "stats": ("", "tokens and times of the last reply"),
        "quit": ("", "leaves, as Ctrl-D does"),
    }
)
ENTERING = (
    'A message of several lines stands between """ and """, or each line but the last ends with \\.\n'
    "A message that begins with / begins with //. Ctrl-C stops a reply."
)


class Commands:
    """Obeys the commands that need no gateway."""

    def __init__(self, screen: Screen, settings: ChatSettings):
        self._screen, self._settings = screen, settings
        self._own_files: set[Path] = set()  # written or read here: /save may replace them

    def obey(self, name: str, argument: str, conversation: Conversation) -> Conversation:
        """Obeys one of COMMANDS and returns the conversation that goes on. Raises MoietyError if it cannot."""
        match name:
            case "help":
                self._help()
            case "new":
                self._screen.note("A new conversation.")
                return Conversation(conversation.system)
            case "undo":
                if (turn := conversation.undo()) is None:
                    raise InvalidRequest("/undo", "", "after a message")
                self._screen.note(f"Taken back: {_short(turn.message)}")
            case "system":
                self._system(argument, conversation)
            case "set":
                self._set(argument)
            case "save":
                self._save(argument, conversation)
            case "load":
                return self._load(argument)
        return conversation

    def _help(self) -> None:
        shown = {f"/{name} {argument}".strip(): text for name, (argument, text) in COMMANDS.items()}
        width = max(map(len, shown))
        lines = [f"{command:<{width}}  {text}" for command, text in shown.items()]
        self._screen.answer("\n".join([*lines, ENTERING]))

    def _system(self, text: str, conversation: Conversation) -> None:
        if not text:
            self._screen.answer(conversation.system or "There is no system message.")
            return
        conversation.system = None if text == "-" else text

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if name:
            self._settings.set(name, value.strip())
            self._screen.note(str(self._settings))
            return
        self._screen.answer(f"{self._settings}\nCan be set: {', '.join(self._settings.names)}")

    def _save(self, argument: str, conversation: Conversation) -> None:
        file = _file("/save", argument)
        if file.exists() and file not in self._own_files:
            raise FailedPrecondition(f"{file} exists: /save replaces only a file that this chat has written or read")
        try:
            conversation.save(file)
        except OSError as error:
            raise FailedPrecondition(f"{file}: {error.strerror}") from None
        self._own_files.add(file)
        self._screen.note(f"{len(conversation.turns)} turns are in {file}.")

    def _load(self, argument: str) -> Conversation:
        file = _file("/load", argument)
        try:
            loaded = Conversation.load(file)
        except OSError as error:
            raise FailedPrecondition(f"{file}: {error.strerror}") from None
        self._own_files.add(file)
        last = f"; the last message: {_short(loaded.turns[-1].message)}" if loaded.turns else ""
        self._screen.note(f"{len(loaded.turns)} turns{last}")
        return loaded


def _file(command: str, argument: str) -> Path:
    if not argument:
        raise InvalidRequest(command, "", "with the name of a file")
    return Path(argument).expanduser().absolute()


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"
