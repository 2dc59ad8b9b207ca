"""A chat: what happens to each entry. Streams replies from a gateway and obeys commands."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing

from moiety.client import Chunk, GenerateOptions, ModelInfo, SyncClient
from moiety.core.sampling import FinishReason
from moiety.errors import FailedPrecondition, InvalidRequest, MoietyError
from moiety.tools.chat.commands import COMMANDS, Commands
from moiety.tools.chat.conversation import Conversation, tokens_of
from moiety.tools.chat.reasoning import ReasoningSplitter
from moiety.tools.chat.screen import DIM, Screen
from moiety.tools.chat.settings import ChatSettings
from moiety.tools.chat.stats import Stats

ROOM = 512  # tokens of the context that a reply should find free where max_tokens does not say


class Chat:
    """One conversation with one model. `failures` counts the errors that it has shown."""

    def __init__(
        self,
        client: SyncClient,
        model: ModelInfo,
        screen: Screen,
        settings: ChatSettings,
        system: str | None = None,
        options: GenerateOptions | None = None,
    ):
        """`options` are those of every request that `settings` do not change."""
        self._client, self._model, self._screen, self._settings = client, model, screen, settings
        self._options: GenerateOptions = {"recommended": True, **(options or {}), "model": model.name}
        self._conversation = Conversation(system)
        self._commands = Commands(screen, settings)
        self._unanswered = ""  # the last message, if it got no reply
        self._stats: Stats | None = None
        self._opens_inside = False  # whether replies begin as reasoning, see ReasoningSplitter
        self.failures = 0

    def run(self, entries: Iterable[str]) -> None:
        """Answers entries one after the other, until they end or one of them is /quit."""
        self._screen.note(
            f"{self._model.name} · context of {self._model.max_context:,} tokens · {self._client.address} · "
            "/help lists the commands"
        )
        for entry in entries:
            try:
                if not self._handle(entry):
                    return
            except MoietyError as error:
                self._failed(error)
            except KeyboardInterrupt:
                self._screen.end_reply()

    def _handle(self, entry: str) -> bool:
        """Does what an entry asks for; returns whether the chat goes on."""
        if not entry.startswith("/"):
            self._say(entry)
            return True
        if entry.startswith("//"):
            self._say(entry[1:])
            return True
        name, _, argument = entry[1:].partition(" ")
        argument = argument.strip()
        if name == "quit":
            return False
        if name == "retry":
            self._retry()
        elif name == "stats":
            self._screen.answer(self._shown_stats())
        elif name in COMMANDS:
            self._conversation = self._commands.obey(name, argument, self._conversation)
        else:
            raise InvalidRequest(
                "command", f"/{name}", "one that /help lists; a message that begins with / begins with //"
            )
        return True

    def _retry(self) -> None:
        message = self._unanswered
        if not message:
            if (turn := self._conversation.undo()) is None:
                raise FailedPrecondition("there is no message yet to send again")
            message = turn.message
        self._say(message)

    def _say(self, message: str) -> None:
        """Sends a message and shows the reply. Where the context is full, leaves the oldest turns out and says so."""
        conversation, most = self._conversation, self._model.max_context
        self._unanswered = message
        before = conversation.dropped
        wanted = self._settings.values.get("max_tokens") or ROOM
        conversation.make_room(message, most, min(wanted, most // 4))
        while True:
            if conversation.dropped > before:
                before = conversation.dropped
                oldest = "turn is" if before == 1 else f"{before} turns are"
                self._screen.note(f"The context of {most:,} tokens is full: the oldest {oldest} left out from now on.")
            try:
                self._stream(message)
                return
            except InvalidRequest as error:
                if not _is_too_long(error) or not conversation.drop_oldest():
                    raise

    def _stream(self, message: str) -> None:
        """Shows the reply to a message as it comes, and adds both to the conversation."""
        splitter, stats = ReasoningSplitter(self._opens_inside), Stats()
        failed: MoietyError | None = None
        stopped = False
        stream = self._client.generate(self._conversation.prompt(message), **{**self._options, **self._settings.values})
        try:
            with closing(stream) as chunks:
                for chunk in chunks:
                    stats.add(chunk)
                    self._show(chunk, splitter)
        except KeyboardInterrupt:
            stopped = True
        except MoietyError as error:
            if not stats.new_tokens:
                raise
            failed = error
        if not self._screen.interactive and not stats.text.endswith("\n"):
            self._screen.reply("\n")
        self._screen.end_reply()
        self._keep(message, splitter, stats)
        self._note_end(stats, stopped)
        if failed is not None:
            self._failed(failed)

    def _show(self, chunk: Chunk, splitter: ReasoningSplitter) -> None:
        pieces = list(splitter.push(chunk.text, last=chunk.finish_reason is not None))
        if not self._screen.styled:  # the markers tell what is reasoning
            self._screen.reply(chunk.text)
            return
        for text, is_reasoning in pieces:
            self._screen.reply(text, style=DIM if is_reasoning else "")

    def _keep(self, message: str, splitter: ReasoningSplitter, stats: Stats) -> None:
        """Adds the turn, without its reasoning, as templates of reasoning models do."""
        self._stats = stats
        answer = splitter.answer
        if splitter.inside and self._opens_inside and stats.finish_reason is FinishReason.STOP:
            answer, self._opens_inside = stats.text, False  # this reply had no reasoning
        else:
            self._opens_inside = splitter.opened_by_prompt
        answer = answer.strip()
        if not answer:
            self._screen.note("There was no answer, so the message is not kept; /retry sends it again.")
            return
        self._unanswered = ""
        share = min(len(answer) / max(len(stats.text), 1), 1.0)
        if stats.prompt_tokens:
            context_tokens = stats.prompt_tokens + round(stats.new_tokens * share)
        else:  # it was stopped: the gateway did not say how long the prompt is
            context_tokens = self._conversation.tokens + tokens_of(message) + round(stats.new_tokens * share)
        self._conversation.add(message, answer, context_tokens)

    def _note_end(self, stats: Stats, stopped: bool) -> None:
        if stopped:
            self._screen.note("Stopped.")
        elif stats.finish_reason is FinishReason.LENGTH:
            full = stats.prompt_tokens + stats.new_tokens >= self._model.max_context
            why = "the context is full" if full else "it has max_tokens; /set max_tokens changes that"
            self._screen.note(f"Cut off after {stats.new_tokens} tokens: {why}.")

    def _shown_stats(self) -> str:
        if self._stats is None:
            raise FailedPrecondition("there is no reply yet")
        used = f"about {self._conversation.tokens:,} of {self._model.max_context:,} tokens of context used"
        return f"{self._stats}; {used}"

    def _failed(self, error: MoietyError) -> None:
        self.failures += 1
        self._screen.error(str(error))


def _is_too_long(error: InvalidRequest) -> bool:
    """Returns whether a gateway's refusal is about the prompt's length, alone or together with max_tokens."""
    text = str(error)
    return text.startswith(("prompt = ", "prompt.text = ")) or "are in a context of" in text
