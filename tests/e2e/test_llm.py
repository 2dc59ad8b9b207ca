"""`from moiety import LLM`: one model on this machine, used from a script, from threads and inside an event loop.

Four clusters start here, each for its own reason: one serves most tests, one has no tokenizer, two end in different ways.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from moiety import LLM
from moiety.client import Completion
from moiety.errors import CheckpointError, InvalidRequest
from moiety.synthetic import write_tiny
from moiety.testing import eventually

OPTIONS = {"max_tokens": 6, "ignore_eos": True}
PROMPTS = ["Each expert", [5, 6, 7], [{"role": "user", "content": "hello"}], "Router"]

# Prints the pids of the model's processes, is interrupted while it generates, generates again, and ends in the way asked for.
SCRIPT = """
import sys
import psutil
from moiety import LLM

llm = LLM(sys.argv[1], dtype="float32")
try:
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    llm.generate(["on and on"] * 4, max_tokens=400, ignore_eos=True)
except KeyboardInterrupt:
    print(len(llm.generate("again", max_tokens=3, ignore_eos=True)[0].token_ids), flush=True)
if sys.argv[2] == "close":
    llm.close()
    llm.close()
    try:
        llm.generate("late")
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of a chat model."""
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    """The model, for all tests of this file."""
    with LLM(folder, dtype="float32", concurrency=8) as opened:
        yield opened


def ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    """Returns the tokens of each completion."""
    return [completion.token_ids for completion in completions]


def test_every_kind_of_prompt_keeps_its_place(llm: LLM):
    """A text, token ids and messages, alone or in a list of any length, give the same tokens, in the prompts' order."""
    alone = [llm.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    assert [len(completions) for completions in alone] == [1] * 4
    expected = [completion for (completion,) in alone]
    assert ids(llm.generate(PROMPTS, **OPTIONS)) == ids(expected)
    assert ids(llm.generate(PROMPTS * 10, **OPTIONS)) == ids(expected) * 10
    assert llm.generate([]) == []
    assert [len(set(each)) for each in (ids(expected), [one.text for one in expected])] == [4, 4]
    first = expected[0]
    assert (first.completion_tokens, first.finish_reason, len(first.token_ids)) == (6, "length", 6)
    assert first.timings is not None


def test_options_are_those_of_the_client(llm: LLM):
    """Choices, log probabilities and stop texts come back as values; the stream has the same text in pieces."""
    whole = llm.generate("Each", **OPTIONS)[0].text
    (several,) = llm.generate("Each", n=2, logprobs=True, top_logprobs=2, prompt_logprobs=True, **OPTIONS)
    assert [choice.text for choice in several.choices] == [whole, whole]
    assert [(len(choice.logprobs), len(choice.top_logprobs)) for choice in several.choices] == [(6, 6)] * 2
    assert len(several.prompt_logprobs) == len(several.prompt_top_logprobs) == several.prompt_tokens - 1
    assert "".join(chunk.text for chunk in llm.stream("Each", **OPTIONS)) == whole
    (stopped,) = llm.generate("Each", stop=whole[1], **OPTIONS)
    assert (stopped.text, stopped.choices[0].matched_stop) == (whole[: whole.index(whole[1])], whole[1])
    with pytest.raises(TypeError, match="no option colour"):
        llm.generate("Each", colour=3)  # type: ignore[call-overload]


def test_chat_uses_the_template(llm: LLM):
    """A text is the user's only message, and equals a conversation of that message."""
    messages = [{"role": "user", "content": "hello"}]
    greedy = {"temperature": 0, **OPTIONS}
    assert (
        ids(llm.chat("hello", **greedy)) == ids(llm.chat(messages, **greedy)) == ids(llm.generate(messages, **OPTIONS))
    )
    assert ids(llm.chat(["hello", messages], **greedy)) == ids(llm.chat("hello", **greedy)) * 2
    with pytest.raises(InvalidRequest, match="conversation"):
        llm.chat([[5, 6]])  # type: ignore[list-item]


def test_errors_are_raised_or_returned(llm: LLM):
    """The first error is raised and says which prompt it is about; with return_errors it takes its completion's place."""
    prompts = ["good", [9999], "also good"]
    with pytest.raises(InvalidRequest, match="below the vocabulary") as raised:
        llm.generate(prompts, **OPTIONS)
    assert raised.value.__notes__ == ["prompt 1 of 3, counted from 0"]
    good, wrong, other = llm.generate(prompts, return_errors=True, **OPTIONS)
    assert isinstance(wrong, InvalidRequest)
    assert isinstance(good, Completion)
    assert isinstance(other, Completion)


def test_several_threads(llm: LLM):
    """Calls from many threads at once get their own tokens."""
    prompts = [f"prompt {number}" for number in range(8)]
    expected = ids(llm.generate(prompts, **OPTIONS))
    with ThreadPoolExecutor(8) as threads:
        got = list(threads.map(lambda prompt: llm.generate(prompt, **OPTIONS)[0].token_ids, prompts))
    assert got == expected


async def test_inside_an_event_loop(llm: LLM):
    """In a notebook, whose cells run inside an event loop, calls work as elsewhere."""
    assert len(llm.generate("Each", **OPTIONS)) == 1


def test_a_model_that_is_not_there(tmp_path: Path):
    """What is neither a folder nor an id, and a folder without a checkpoint, raise CheckpointError."""
    for model in ("no such model", tmp_path):
        with pytest.raises(CheckpointError):
            LLM(model)


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path, llm: LLM, folder: Path):
    """It is refused before anything starts; with skip_tokenizer it gives the same token ids, and no text."""
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "*.jinja"))
    with pytest.raises(CheckpointError, match=r"no tokenizer: .*gateway\.skip_tokenizer"):
        LLM(bare)
    with LLM(bare, dtype="float32", skip_tokenizer=True) as without:
        (completion,) = without.generate([[5, 6, 7]], **OPTIONS)
        with pytest.raises(InvalidRequest, match="this gateway has no tokenizer"):
            without.generate("Each expert")
    assert completion.token_ids == llm.generate([[5, 6, 7]], **OPTIONS)[0].token_ids
    assert completion.text == ""


@pytest.mark.parametrize("end", ["close", "nothing"])
async def test_nothing_is_left(folder: Path, end: str):
    """Ctrl-C cancels what is generated and leaves the model; `close`, or the script's end without it, ends all processes."""
    script = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SCRIPT, str(folder), end), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert script.stdout is not None
        async with asyncio.timeout(100):
            pids = [int(pid) for pid in (await script.stdout.readline()).split()]
            assert len(pids) >= 4
            script.send_signal(signal.SIGINT)
            assert await script.stdout.readline() == b"3\n"
            assert await script.stdout.read() == (b"Cancelled\n" if end == "close" else b"")
            assert await script.wait() == 0
        await eventually(lambda: not [pid for pid in pids if psutil.pid_exists(pid)])
    finally:
        if script.returncode is None:
            script.kill()
            await script.wait()
