"""Reads traces and datasets in JSON lines. A wrong line is named by its number and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from moiety.bench.load.work import MOST_TOKENS, Endpoint
from moiety.errors import InvalidRequest

Prompt = str | list[Any]  # of completions: text or token ids; of chat: messages


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request of a trace. `at_s` counts from the trace's first request."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # ids of the prompt's blocks of 512 tokens; equal ids are equal text


def read_trace(file: Path, speed: float = 1.0) -> list[TraceEntry]:
    """Reads a trace in the form of Mooncake's public ones; `speed` divides the times.

    A line has `timestamp` in ms, `input_length` and `output_length` in tokens, and may have `hash_ids`, one for each block of
    512 prompt tokens. Raises InvalidRequest.
    """
    entries: list[TraceEntry] = []
    first_ms = last_ms = 0.0
    for number, line in _lines(file):
        at_ms: Any = line.get("timestamp")
        if not _is_number(at_ms) or at_ms < last_ms:
            raise _wrong(file, number, "timestamp", at_ms, "milliseconds, at least those of the line before")
        for name in ("input_length", "output_length"):
            if not _is_count(line.get(name)):
                raise _wrong(file, number, name, line.get(name), f"a number of tokens from 1 to {MOST_TOKENS}")
        blocks = line.get("hash_ids") or []
        if not isinstance(blocks, list) or not all(isinstance(block, int) for block in blocks):
            raise _wrong(file, number, "hash_ids", blocks, "a list of integers")
        first_ms, last_ms = (first_ms if entries else at_ms), at_ms
        at_s = (at_ms - first_ms) / 1000 / speed
        entries.append(TraceEntry(at_s, line["input_length"], line["output_length"], tuple(blocks)))
    if not entries:
        raise InvalidRequest("--trace", str(file), "a file with at least one line")
    return entries


def read_dataset(file: Path, endpoint: Endpoint) -> list[Prompt]:
    """Reads the prompts of a dataset, as `endpoint` takes them. Raises InvalidRequest.

    A line has `prompt` (text or token ids) or `messages`. For chat, a text becomes one message of a user.
    """
    prompts: list[Prompt] = []
    for number, line in _lines(file):
        prompt: Any = line.get("prompt")
        messages: Any = line.get("messages")
        if endpoint == "chat" and isinstance(messages, list) and messages:
            prompts.append(messages)
        elif endpoint == "chat" and isinstance(prompt, str) and prompt:
            prompts.append([{"role": "user", "content": prompt}])
        elif endpoint == "completions" and _is_prompt(prompt):
            prompts.append(prompt)
        else:
            name, value = ("messages", messages) if "messages" in line else ("prompt", prompt)
            bound = (
                "messages or a text" if endpoint == "chat" else "a text or token ids (messages need --endpoint chat)"
            )
            raise _wrong(file, number, name, value, bound)
    if not prompts:
        raise InvalidRequest("--dataset", str(file), "a file with at least one line")
    return prompts


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and object of each line that is not empty."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, start=1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if not isinstance(line, dict):
                    raise InvalidRequest(f"{file}: line {number}", text.strip(), "a JSON object")
                yield number, line
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest("file", str(file), f"a readable UTF-8 file ({error})") from None


def _wrong(file: Path, number: int, field: str, value: object, bound: str) -> InvalidRequest:
    return InvalidRequest(f"{file}: line {number}: {field}", value, bound)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_TOKENS


def _is_prompt(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    return isinstance(value, str) and bool(value)
