"""The formats by name, and the choice of one for a checkpoint."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from moiety.core.sampling import Guide
from moiety.gateway.formats.deepseek import CALLS_BEGIN, DEEPSEEK, DEEPSEEK_V31
from moiety.gateway.formats.family import THINK
from moiety.gateway.formats.forcing import Forcing
from moiety.gateway.formats.harmony import CHANNEL, GPT_OSS
from moiety.gateway.formats.hermes import HERMES, OPEN
from moiety.gateway.formats.llama import LLAMA, PYTHON_TAG
from moiety.gateway.formats.mistral import ARGS, CALLS, MISTRAL, MISTRAL_ARGS
from moiety.gateway.formats.pieces import NewId, OutputParser, call_id
from moiety.gateway.formats.plain import PLAIN
from moiety.gateway.formats.pythonic import LLAMA4, PYTHON_START
from moiety.gateway.formats.tool import Tool

__all__ = ["FORMATS", "Forcing", "Format", "Tool", "format_for"]


class Format(Protocol):
    """How the models of one family mark reasoning and tool calls in text."""

    @property
    def name(self) -> str:
        """The name in settings."""
        ...

    @property
    def special_tokens(self) -> bool:
        """Whether markers are special tokens, so that parsers need text decoded with special tokens kept."""
        ...

    @property
    def has_calls(self) -> bool:
        """Whether the format has tool calls. Without them `tools` are to be refused."""
        ...

    def parser(self, *, tools: bool, reasoning_open: bool = False, new_id: NewId = call_id) -> OutputParser:
        """Returns a parser for one output.

        tools: whether the request has tools; without them, markers of calls are content. reasoning_open: the prompt ended
        inside reasoning. new_id: makes the ids of calls.
        """
        ...

    def forced(self, tools: Sequence[Tool], name: str | None, how: Forcing | None = None) -> Guide:
        """Returns a guide whose every output is one or more calls of any tool, or one call of the tool `name`.

        The arguments match the tool's JSON Schema. Raises InvalidRequest if there are no tools, or none is called `name`;
        FailedPrecondition if the format has no calls.
        """
        ...


_ALL: tuple[Format, ...] = (HERMES, LLAMA, LLAMA4, MISTRAL, MISTRAL_ARGS, DEEPSEEK, DEEPSEEK_V31, GPT_OSS, PLAIN)
FORMATS: Mapping[str, Format] = MappingProxyType({each.name: each for each in _ALL})
# In templates with `<tool_call>` whose calls are no JSON objects: Qwen3-Coder, GLM-4.5, Hunyuan.
_NOT_HERMES = ("<function=", "<arg_key>", "<tool_sep>")


def format_for(template: str, vocabulary: Container[str]) -> Format | None:
    """Returns the format of a checkpoint with this chat template and vocabulary.

    Returns `plain` where the calls are unknown but reasoning is marked, and None where neither is known. A format with
    calls is chosen only if the template renders calls: otherwise the prompt does not show the tools.
    """
    if CHANNEL in template and CHANNEL in vocabulary:
        return GPT_OSS
    if CALLS_BEGIN in template:
        return DEEPSEEK if "```json" in template else DEEPSEEK_V31
    if CALLS in template:
        return MISTRAL_ARGS if ARGS in template else MISTRAL
    if PYTHON_START in template and "tool_calls" in template:
        return LLAMA4
    if OPEN in template and "arguments" in template and not any(marker in template for marker in _NOT_HERMES):
        return HERMES
    if PYTHON_TAG in vocabulary and '"parameters"' in template:
        return LLAMA
    return PLAIN if THINK[0] in template or THINK[0] in vocabulary else None
