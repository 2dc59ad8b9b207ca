"""A checkpoint's chat template: how the messages of a conversation become the text of a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moiety.errors import CheckpointError, InvalidRequest, ResourceExhausted
from moiety.model.checkpoint.chat_messages import ContentForms, template_messages
from moiety.model.checkpoint.chat_renderer import ChatRenderer, TemplateFailed
from moiety.model.checkpoint.side_files import PROCESSOR_TEMPLATE_FILE, read_side_file

DEFAULT, TOOL_USE = "default", "tool_use"
RETRY_S = 5.0
RESERVED = frozenset(  # what `render` itself passes to transformers' renderer
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "conversations",
        "template",
        "chat_template",
        "return_assistant_tokens_mask",
        "self",  # an argument of jinja's own
    }
)
_NEEDLES = ("moiety probe one", "moiety probe two")
_CALL = {"id": "probe0000", "type": "function", "function": {"name": "probe", "arguments": {}}}


class ChatTemplate:
    """The chat templates of one checkpoint. Any thread may use it."""

    def __init__(
        self, folder: str, templates: Mapping[str, str], special_tokens: Mapping[str, Any], renderer: ChatRenderer
    ):
        """`special_tokens`: those that templates know by name, such as `bos_token`. Nothing is compiled yet."""
        self._folder, self._templates, self._special = folder, dict(templates), dict(special_tokens)
        self._renderer = renderer
        self._forms: dict[tuple[str, str], ContentForms] = {}  # by template and role

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Any, renderer: ChatRenderer | None = None) -> ChatTemplate | None:
        """Returns the templates of a checkpoint folder, compiled once; None if it has none.

        They are those that transformers gave `tokenizer`, from chat_template.jinja and additional_chat_templates/ or else
        tokenizer_config.json; where it has none, that of chat_template.json, the file of a multimodal processor. Blocks for
        about a second, unless a `renderer` that runs is given. Raises CheckpointError if a template is not one.
        """
        templates = _named(folder, getattr(tokenizer, "chat_template", None))
        if not templates:
            templates = _named(folder, read_side_file(Path(folder), PROCESSOR_TEMPLATE_FILE).get("chat_template"))
        if not templates:
            return None
        opened = cls(str(folder), templates, tokenizer.special_tokens_map, renderer or ChatRenderer())
        try:
            for name, template in templates.items():
                opened._check(name, template)
        except BaseException:
            opened.close()
            raise
        return opened

    @property
    def text(self) -> str:
        """The templates' source: the default one's, then that for conversations with tools where the checkpoint has two."""
        chosen = [self._templates[name] for name in (DEFAULT, TOOL_USE) if name in self._templates]
        return "\n".join(chosen or self._templates.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt's text, equal to that of transformers' `apply_chat_template(…, tokenize=False)`.

        `messages` and `tools` are in OpenAI's form, see `template_messages`. `arguments` are the template's further
        variables, such as `enable_thinking`. `continue_final_message`: the text ends within the last message, for the model
        to continue it; `add_generation_prompt` must then be False.

        The text holds the special tokens that the template writes, the first one (BOS) included. So encode it with
        `add_special_tokens=False`. Special tokens in the content of messages count, too, as in other servers.

        Blocks, for a millisecond in the usual case: call it in a worker thread. Time, memory and output are bounded, see
        `chat_renderer.py`. Raises InvalidRequest: for a message that is none, for what the template refuses
        (`raise_exception`), and for what it takes too much of time or memory for. Raises ResourceExhausted on a machine that is
        too busy.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest("continue_final_message", True, "false where add_generation_prompt is true")
        for field, objects in (("tools", tools), ("documents", documents)):
            for index, value in enumerate(objects):
                if not isinstance(value, Mapping):
                    raise InvalidRequest(f"{field}[{index}]", value, "an object")
        template = self._template(with_tools=bool(tools))
        known = template_messages(messages, template, lambda role: self._content_forms(template, role))
        more = dict(arguments or {})
        if wrong := next((name for name in more if name in RESERVED), None):
            raise InvalidRequest(
                f"chat_template_kwargs.{wrong}",
                more[wrong],
                "left out: the request says it elsewhere, or the name is jinja's",
            )
        variables = {
            **self._special,
            **more,
            "messages": known,
            "tools": [dict(tool) for tool in tools] or None,
            "documents": [dict(document) for document in documents] or None,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        return self._rendered(template, variables)

    def close(self) -> None:
        """Ends the process that renders."""
        self._renderer.close()

    def _rendered(self, template: str, variables: Mapping[str, Any]) -> str:
        roles = [message["role"] for message in variables["messages"]]
        try:
            text = self._run(template, variables)
        except TemplateFailed as error:
            raise InvalidRequest("messages", roles, f"what the model's chat template takes: {error}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest("messages", roles, f"JSON values, as tools and template arguments: {error}") from error
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("messages", roles, "valid Unicode, without lone surrogates") from None
        return text

    def _run(self, template: str, variables: Mapping[str, Any]) -> str:
        """As `ChatRenderer.render`, but a machine that is too busy is ResourceExhausted."""
        try:
            return self._renderer.render(template, variables)
        except TimeoutError as error:
            raise ResourceExhausted(str(error), RETRY_S) from None

    def _template(self, with_tools: bool) -> str:
        """Returns the template for a conversation with or without tools, chosen as transformers does."""
        for name in (TOOL_USE, DEFAULT) if with_tools else (DEFAULT,):
            if name in self._templates:
                return self._templates[name]
        if len(self._templates) == 1:
            return next(iter(self._templates.values()))
        names = ", ".join(sorted(self._templates))
        raise CheckpointError(f"{self._folder}: has chat templates {names}, but none named {DEFAULT}")

    def _check(self, name: str, template: str) -> None:
        """Raises CheckpointError if `template` does not compile."""
        try:
            self._run(template, {})
        except TemplateFailed as error:
            raise CheckpointError(f"{self._folder}: the chat template {name} does not compile: {error}") from error

    def _content_forms(self, template: str, role: str) -> ContentForms:
        """Returns how `template` takes the content of `role`, found by rendering a text in either form.

        A list of parts in a template that expects a string shows as Python's or JSON's text of the list. A string in a template
        that loops over parts vanishes.
        """
        key = template, role
        if key not in self._forms:
            as_text = self._probe(template, role, _NEEDLES[0])
            as_parts = self._probe(template, role, [{"type": "text", "text": needle} for needle in _NEEDLES])
            parts = all(needle in as_parts for needle in _NEEDLES)
            parts = parts and not re.search(rf"""["']text\\*["']: *\\*["']{_NEEDLES[0]}""", as_parts)
            self._forms[key] = ContentForms(strings=_NEEDLES[0] in as_text or not parts, parts=parts)
        return self._forms[key]

    def _probe(self, template: str, role: str, content: Any) -> str:
        """Returns the text of a short conversation in which a message of `role` has `content`; "" if the template fails."""
        message: dict[str, Any] = {"role": role, "content": content}
        user = {"role": "user", "content": "a"}
        conversation = {
            "user": [message],
            "assistant": [user, message, user],
            "tool": [user, {"role": "assistant", "tool_calls": [_CALL]}, {**message, "tool_call_id": _CALL["id"]}],
        }.get(role, [message, user])
        try:
            return self._run(
                template, {**self._special, "messages": conversation, "tools": None, "add_generation_prompt": False}
            )
        except TemplateFailed:
            return ""


def _named(folder: str | Path, stated: Any) -> dict[str, str]:
    """Returns templates by name from what a file states: one text, a mapping, or a list of {name, template}."""
    if not stated:
        return {}
    if isinstance(stated, str):
        return {DEFAULT: stated}
    if isinstance(stated, list) and all(isinstance(one, dict) and {"name", "template"} <= one.keys() for one in stated):
        stated = {one["name"]: one["template"] for one in stated}
    if not isinstance(stated, dict) or not all(isinstance(text, str) for text in stated.values()):
        raise CheckpointError(
            f"{folder}: chat_template = {json.dumps(stated)[:80]}: must be a template, or templates by name"
        )
    return dict(stated)
