"""`moiety chat` in a terminal and through pipes, against a real gateway over a fake engine."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path

import pytest
from chat_support import CTRL_C, CTRL_D, piped, served, temperature, terminal

from moiety.errors import FailedPrecondition
from moiety.synthetic.tokenizer import write_chat_tokenizer
from moiety.testing import eventually
from moiety.tools.chaos.relay import Relay


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chat model's tokenizer and template."""
    folder = tmp_path_factory.mktemp("chatty")
    write_chat_tokenizer(folder)
    return folder


async def test_a_conversation_in_a_terminal(chatty: Path, tmp_path: Path):
    """The first line names model, context and address; replies appear; each prompt has all earlier turns; Ctrl-D leaves."""
    async with served(chatty) as gateway, terminal(gateway.address, "--system", "Be kind.", state=tmp_path) as screen:
        first = await screen.until("> ")
        assert f"fake · context of 2,000 tokens · {gateway.address}" in first
        gateway.reply("Good day.")
        assert "Good day." in await screen.say("hello", "Good day.")
        await screen.say("and now?", "Good day.")
        assert gateway.prompt() == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
            "<|im_start|>assistant\nGood day.<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert temperature(gateway.engine) == 1.0  # as in the HTTP API where the publisher says nothing
        screen.type(CTRL_D)
        assert await screen.ended() == 0


async def test_a_reply_streams_and_ctrl_c_stops_it(chatty: Path, tmp_path: Path):
    """Text appears while the model generates. Ctrl-C ends the request and keeps what came; at a prompt it drops the line."""
    held = asyncio.Event()

    async def hold(position: int) -> None:
        if position == 5:
            await held.wait()

    async with served(chatty) as gateway, terminal(gateway.address, state=tmp_path) as screen:
        await screen.until("> ")
        gateway.reply("12345 and more")
        gateway.engine.before_token = hold
        screen.type("count\r")
        await screen.until("12345")
        screen.type(CTRL_C)
        await screen.until("Stopped.\n> ")
        await eventually(lambda: gateway.engine.cancelled == 1)
        held.set()
        screen.type("a line that is dropped")
        await screen.until("dropped")
        screen.type(CTRL_C)
        await screen.until("Ctrl-D or /quit leaves.\n> ")
        await screen.say("go on", "12345 and more")
        assert "count<|im_end|>\n<|im_start|>assistant\n12345<|im_end|>" in gateway.prompt()
        assert "dropped" not in gateway.prompt()


async def test_commands(chatty: Path, tmp_path: Path):
    """Each command does what /help says, and a wrong one is an error of one line."""
    file = tmp_path / "talk.json"
    async with served(chatty) as gateway, terminal(gateway.address, state=tmp_path) as screen:
        await screen.until("> ")
        assert "/save FILE" in await screen.say("/help", "Ctrl-C stops a reply.")
        assert "error: there is no reply yet" in await screen.say("/stats", "error:")
        gateway.reply("one")
        await screen.say("/system Be brief.", "> ")
        assert "temperature 0.25" in await screen.say("/set temperature 0.25", "temperature 0.25\n")
        await screen.say("/set stop 'a b' c", "stop ('a b', 'c')")
        await screen.say("first", "one\n")
        assert gateway.prompt().startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
        assert temperature(gateway.engine) == 0.25
        stats = await screen.say("/stats", "context used")
        assert re.search(r"prompt \d+ tokens \(0 cached\), reply \d tokens; queued \d+\.\d\d s, prefill ", stats)
        assert " of 2,000 tokens of context used" in stats
        gateway.reply("two")
        await screen.say("/retry", "two\n")
        assert gateway.prompt().endswith("user\nfirst<|im_end|>\n<|im_start|>assistant\n")
        assert "one" not in gateway.prompt()
        await screen.say("second", "two\n")
        await screen.say("/undo", "Taken back: second")
        await screen.say(f"/save {file}", f"Saved to {file}: 1 turn.")
        assert json.loads(file.read_text()) == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "two"},
        ]
        await screen.say("/new", "A new conversation.")
        await screen.say("third", "two\n")
        assert "first" not in gateway.prompt()
        await screen.say(f"/load {file}", "Loaded 1 turn; the last message: first")
        await screen.say("//slash", "two\n")
        assert "first<|im_end|>" in gateway.prompt()
        assert "user\n/slash<|im_end|>" in gateway.prompt()
        for wrong, why in (
            ("/set temperature hot", "error: setting temperature = 'hot': 'hot' is not a valid float"),
            ("/set colour 3", "error: /set = 'colour': must be one of max_tokens, "),
            ("/nothing", "error: command = '/nothing': must be one that /help lists"),
            (f"/load {tmp_path}/none", "none: No such file or directory"),
            (f"/save {chatty}/tokenizer.json", "tokenizer.json exists"),
        ):
            assert "\nerror: " in await screen.say(wrong, why)
        screen.type("/quit\r")
        assert await screen.ended() == 0


async def test_messages_of_several_lines(chatty: Path, tmp_path: Path):
    """Triple quotes, and a backslash at a line's end, join lines to one message."""
    async with served(chatty) as gateway, terminal(gateway.address, state=tmp_path) as screen:
        await screen.until("> ")
        gateway.reply("yes")
        screen.type('"""one\r')
        await screen.until(". ")
        screen.type("two\r")
        await screen.until(". ")
        await screen.say('three"""', "yes\n")
        assert "user\none\ntwo\nthree<|im_end|>" in gateway.prompt()
        screen.type("four\\\r")
        await screen.until(". ")
        await screen.say("five", "yes\n")
        assert "user\nfour\nfive<|im_end|>" in gateway.prompt()


async def test_a_full_context_drops_the_oldest_turns(chatty: Path, tmp_path: Path):
    """Where the context is full, the chat says so, leaves the oldest turns out and goes on; the saved file has all of them."""
    file = tmp_path / "talk.json"
    async with served(chatty, max_context=200) as gateway, terminal(gateway.address, state=tmp_path) as screen:
        await screen.until("> ")
        gateway.reply("fine")
        seen = ""
        for number in range(6):
            seen += await screen.say(f"message {number}", "fine\n")
        assert "The context of 200 tokens is full: the oldest turn is left out from now on." in seen
        assert "message 5" in gateway.prompt()
        assert "message 0" not in gateway.prompt()
        await screen.say("x" * 300, "error: prompt = '")
        await screen.say("short again", "fine\n")
        await screen.say(f"/save {file}", f"Saved to {file}: 7 turns.")
        assert len(json.loads(file.read_text())) == 14


async def test_errors_leave_the_conversation(chatty: Path, tmp_path: Path):
    """A failure is one line that names the reason; the same message can be sent again, and the conversation is as before."""

    async def fail(_: int) -> None:
        raise FailedPrecondition("the experts are on holiday")

    async with served(chatty) as gateway, terminal(gateway.address, state=tmp_path) as screen:
        await screen.until("> ")
        gateway.reply("fine")
        await screen.say("first", "fine\n")
        hook, gateway.engine.before_token = gateway.engine.before_token, fail
        assert "error: the experts are on holiday\n> " in await screen.say("second", "holiday")
        gateway.engine.before_token = hook
        await screen.say("/retry", "fine\n")
        assert gateway.prompt().count("<|im_start|>user") == 2
        assert "second" in gateway.prompt()


async def test_a_checkpoint_without_a_template(chatty: Path, tmp_path: Path):
    """The error says that the checkpoint has no chat template."""
    async with served(chatty, chats=False) as gateway:
        status, out, err = await piped(gateway.address, "hello\n")
    assert (status, out) == (1, "")
    assert "this checkpoint has no chat template" in err
    assert err.count("\n") == 1


async def test_a_gateway_that_goes_and_one_that_was_never_there(chatty: Path, tmp_path: Path):
    """Without a gateway the command fails with its address; one that goes during a chat is an error, and the chat goes on."""
    async with served(chatty) as gateway:
        relay = Relay(int(gateway.address.rpartition(":")[2]))
        await relay.start(0)
        gone = f"{relay.host}:{relay.port}"
        async with terminal(gone, state=tmp_path) as screen:
            await screen.until("> ")
            gateway.reply("fine")
            await screen.say("first", "fine\n")
            await relay.close()
            assert f"error: gateway {gone}: " in await screen.say("second", "error: ")
            screen.type(CTRL_D)
            assert await screen.ended() == 0
    status, out, err = await piped(gone, "hello\n")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: gateway {gone}: ")


@pytest.mark.parametrize("style", ["dim", "none"])
async def test_reasoning_is_dim(chatty: Path, tmp_path: Path, style: str):
    """Reasoning is dim, without its markers, and not sent again. With NO_COLOR nothing is styled, and the markers stay."""
    environment = {} if style == "dim" else {"NO_COLOR": "1"}
    async with (
        served(chatty) as gateway,
        terminal(gateway.address, state=tmp_path, **environment) as screen,
    ):
        await screen.until("> ")
        gateway.reply("<think>hmm</think>yes")
        screen.type("well?\r")
        await eventually(lambda: screen.raw.count("yes") == 1 and screen.text.endswith("\n> "), within_s=30)
        if style == "dim":
            dim, plain = screen.raw.index("\x1b[2mh"), screen.raw.index("\x1b[0my")
            assert dim < plain
            assert "think>" not in screen.text
        else:
            assert "<think>hmm</think>yes" in screen.text
            assert "\x1b[2m" not in screen.raw
        screen.raw = ""
        await screen.say("so?", "yes\n")
        assert "assistant\nyes<|im_end|>" in gateway.prompt()


async def test_a_model_cannot_command_the_terminal(chatty: Path, tmp_path: Path):
    """Escape characters of a reply are replaced on a terminal; a pipe gets the text as it is."""
    async with served(chatty) as gateway:
        gateway.reply("a\x1b]0;title\x07b")
        async with terminal(gateway.address, state=tmp_path) as screen:
            await screen.until("> ")
            assert "a\ufffd]0;title\ufffdb" in await screen.say("go", "b\n")
        assert (await piped(gateway.address, "go\n"))[1] == "a\x1b]0;title\x07b\n"


async def test_pipes(chatty: Path):
    """Each line is answered once, in one conversation, without prompts; commands work; an error makes the exit status 1."""
    async with served(chatty) as gateway:
        gateway.reply("fine")
        words = ["--temperature", "0.5", "--template-arguments", '{"enable_thinking": false}']
        status, out, err = await piped(gateway.address, "one\n\n/set seed 7\ntwo", *words)
        assert (status, out, err) == (0, "fine\nfine\n", "")
        assert "one<|im_end|>\n<|im_start|>assistant\nfine<|im_end|>" in gateway.prompt()
        assert gateway.prompt().endswith("<think>\n\n</think>\n\n")
        assert (temperature(gateway.engine), gateway.engine.requests[-1].sampling.seed) == (0.5, 7)
        status, out, err = await piped(gateway.address, "/nothing\none\n")
        assert (status, out) == (1, "fine\n")
        assert err.startswith("error: command = '/nothing'")


async def test_the_model_can_be_named(chatty: Path):
    """--model chooses a served model; another name fails and lists what is served."""
    async with served(chatty) as gateway:
        gateway.reply("fine")
        assert await piped(gateway.address, "one\n", "--model", "fake") == (0, "fine\n", "")
        status, _, err = await piped(gateway.address, "one\n", "--model", "other")
    assert status == 1
    assert "'other' is not served" in err
    assert "fake" in err


async def test_the_history_lasts(chatty: Path, tmp_path: Path):
    """What was entered comes back with the arrow key in the next chat, from a file of its owner; --no-history keeps none."""
    file = tmp_path / "moiety" / "chat_history"
    async with served(chatty) as gateway:
        gateway.reply("fine")
        async with terminal(gateway.address, "--no-history", state=tmp_path) as screen:
            await screen.until("> ")
            await screen.say("unseen", "fine\n")
            screen.type(CTRL_D)
            assert await screen.ended() == 0
        assert not file.exists()
        async with terminal(gateway.address, state=tmp_path) as screen:
            await screen.until("> ")
            await screen.say("remember me", "fine\n")
            screen.type(CTRL_D)
            assert await screen.ended() == 0
        assert file.stat().st_mode & 0o777 == 0o600
        async with terminal(gateway.address, state=tmp_path) as screen:
            await screen.until("> ")
            screen.type("\x1b[A")
            await screen.until("remember me")
            screen.process.send_signal(signal.SIGTERM)
            assert await screen.ended() == 143
    assert "remember me" in file.read_text()
