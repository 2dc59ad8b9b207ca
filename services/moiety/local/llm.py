"""LLM: a model on this machine, for scripts and notebooks. `from moiety import LLM`."""

from __future__ import annotations

import asyncio
import sys
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from pathlib import Path
from typing import Any, Literal, Self, Unpack, cast, overload

import click

from moiety.client import (
    Chunk,
    Client,
    Completion,
    GenerateOptions,
    Messages,
    Prompt,
    SyncClient,
    completion_of,
    is_messages,
)
from moiety.errors import InvalidRequest, MoietyError
from moiety.local.background import BackgroundCluster
from moiety.local.cluster import LocalCluster
from moiety.model.hub import local_folder

CONCURRENCY = 128  # requests at once: four times the sequences that a router runs at once by default
RETRIES = 1000  # of a request that a full queue refuses: it waits for its turn, as the others do

Conversation = str | Messages  # a text is the user's message


class LLM:
    """A checkpoint, served by processes of this machine until `close`. A context manager; any thread may use it.

        with LLM("Qwen/Qwen3-30B-A3B") as llm:
            for completion in llm.generate(["Each expert", "A router"], max_tokens=64):
                print(completion.text)

    It also ends when it is garbage collected, with the interpreter, and with the process, however that ends.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        groups: int = 2,
        dtype: str = "auto",
        concurrency: int = CONCURRENCY,
        skip_tokenizer: bool = False,
        gateway: Mapping[str, Any] | None = None,
        **cluster: Any,
    ) -> None:
        """Starts the processes; returns when they can generate.

        `model` is a checkpoint's folder or a Hugging Face id, which is downloaded first; `revision` is a branch, tag or commit
        of an id. `concurrency` is how many requests run or wait at once. `skip_tokenizer`: prompts and outputs are token ids
        only, and the checkpoint needs no tokenizer. `groups`, `dtype`, `gateway` and further arguments are those of
        LocalCluster.

        Raises CheckpointError, ConfigError, or Unavailable with the end of the log of a process that did not start.
        """
        if concurrency < 1:
            raise InvalidRequest("concurrency", concurrency, "at least 1")
        folder = local_folder(str(model), revision, say=_say)
        name = {} if Path(model).is_dir() else {"served_name": str(model)}  # the folder's name is a commit

        def make() -> LocalCluster:
            settings = {"http": False, "skip_tokenizer": skip_tokenizer, **name, **(gateway or {})}
            return LocalCluster(folder, groups=groups, dtype=dtype, gateway=settings, **cluster)

        self._concurrency = concurrency
        self._cluster = BackgroundCluster(make)
        self._client = SyncClient(self._cluster.address)
        self._close = weakref.finalize(self, _close, self._cluster, self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """The address of the gateway, for other clients of moiety.v1.GenerationService."""
        return self._cluster.address

    def close(self) -> None:
        """Ends the processes. Generations that run end with Cancelled. May be called again."""
        self._close()

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        progress: bool = True,
        return_errors: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        progress: bool = True,
        return_errors: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> list[Completion | MoietyError]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        progress: bool = True,
        return_errors: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Any:
        """Returns a completion for each prompt, in the order of the prompts.

        A prompt is a text, token ids, or messages; `prompts` is one of these or a sequence of them. The options, such as
        `max_tokens` and `temperature`, are those of `Client.generate`. `progress`: show a bar where stderr is a terminal.

        The first error ends the others and is raised, with a note that says which prompt it is about. `return_errors`:
        errors (errors.py) take their completions' places instead. Ctrl-C cancels what runs; the model stays.
        """
        return self._all(_as_prompts(prompts), progress, return_errors, {"retries": RETRIES, **options})

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        progress: bool = True,
        **options: Unpack[GenerateOptions],
    ) -> list[Completion]:
        """Returns the reply to each conversation, in order.

        A conversation is messages ({"role": "user", "content": "…"}) or a text, the user's only message; `conversations` is
        one of these or a sequence of them. Options of sampling that are left out are as the model's publisher recommends, and
        a reply may fill the context. Otherwise as `generate`.
        """
        chosen: GenerateOptions = {"retries": RETRIES, "recommended": True, **options}
        prompts = [_as_messages(each) for each in _as_prompts(conversations)]
        return cast(list[Completion], self._all(prompts, progress, False, chosen))

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generator[Chunk, None, None]:
        """Returns the chunks of one generation as they arrive: see SyncClient.generate."""
        chosen: GenerateOptions = {"retries": RETRIES, **options}
        return self._client.generate(prompt, **chosen)

    def _all(
        self, prompts: Sequence[Prompt], progress: bool, return_errors: bool, options: GenerateOptions
    ) -> list[Completion | MoietyError]:
        with _bar(len(prompts), progress) as advance:

            async def work(client: Client) -> list[Completion | MoietyError]:
                return await _generate(client, prompts, self._concurrency, return_errors, options, advance)

            return self._cluster.run(work)


async def _generate(
    client: Client,
    prompts: Sequence[Prompt],
    concurrency: int,
    return_errors: bool,
    options: GenerateOptions,
    advance: Callable[[int], None],
) -> list[Completion | MoietyError]:
    results: dict[int, Completion | MoietyError] = {}
    waiting = iter(enumerate(prompts))

    async def one_after_the_other() -> None:
        for place, prompt in waiting:
            try:
                async with aclosing(client.generate(prompt, **options)) as stream:
                    results[place] = completion_of([chunk async for chunk in stream])
            except MoietyError as error:
                error.add_note(f"prompt {place} of {len(prompts)}, counted from 0")
                if not return_errors:
                    raise
                results[place] = error
            advance(1)

    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(concurrency, len(prompts))):
                tasks.create_task(one_after_the_other())
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return [results[place] for place in range(len(prompts))]


def _as_prompts(prompts: Any) -> Sequence[Any]:
    """Returns the prompts that a caller means: one text, one list of ids or one conversation is a single prompt."""
    is_one = isinstance(prompts, str) or is_messages(prompts) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [prompts] if is_one else prompts


def _as_messages(conversation: Any) -> Messages:
    messages = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    if not is_messages(messages):
        raise InvalidRequest("conversation", conversation, "a text, or messages with role and content")
    return messages


def _bar(length: int, progress: bool) -> AbstractContextManager[Callable[[int], None]]:
    """Returns a progress bar on stderr, entered as a function that counts; nothing shows where stderr is no terminal."""
    if not progress or not sys.stderr.isatty():
        return nullcontext(lambda _: None)
    return _Bar(click.progressbar(length=length, label="generate", show_pos=True, file=sys.stderr))


class _Bar(AbstractContextManager[Callable[[int], None]]):
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __enter__(self) -> Callable[[int], None]:
        update: Callable[[int], None] = self._bar.__enter__().update
        return update

    def __exit__(self, *raised: object) -> None:
        self._bar.__exit__(*raised)


def _say(line: str) -> None:
    """Shows how a download gets on."""
    print(line, file=sys.stderr)


def _close(cluster: BackgroundCluster, client: SyncClient) -> None:
    client.close()
    cluster.close()
