"""Chat templates: the text is transformers' own, messages are OpenAI's, and no template can hold the process."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moiety.errors import CheckpointError, InvalidRequest, ResourceExhausted
from moiety.model.checkpoint.chat_renderer import WALL_S, ChatRenderer
from moiety.model.checkpoint.chat_template import ChatTemplate
from moiety.synthetic.tokenizer import write_chat_tokenizer, write_tokenizer

PUBLISHED = (  # of the wheel of trl 1.16 (Apache-2.0), which has them as their makers ship them
    *("qwen2_5", "qwen3", "qwen3_6", "qwen3_instruct_2507"),  # the Hermes format of tools
    *("llama3", "llama3_1", "llama3_2"),
    *("deepseekv3", "deepseek_r1_distill", "gptoss", "glm4moe", "cohere2", "gemma3"),
    *("nemotron_3_nano", "lfm2_v2", "phi3_5"),
)
MISTRAL = """{{ bos_token }}
{%- if tools and messages[-1].role == 'user' %}
    {{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role in ('user', 'system') %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}{{ raise_exception('An id of a tool call has nine characters.') }}{% endif %}
            {{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson }}
            {%- if not loop.last %}{{ ',' }}{% endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + {'content': message.content, 'call_id': message.tool_call_id} | tojson + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('No role ' + message.role) }}
    {%- endif %}
{%- endfor %}"""
PARTS_ONLY = "{% for m in messages %}{% for p in m.content if p.type == 'text' %}<{{ p.text }}>{% endfor %}{% endfor %}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <now> & 'then'",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "a city, like Köln"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Köln", "days": 1.0, "deep": {"a": [null]}}'},
}
USER = {"role": "user", "content": "Wie ist das Wetter? <b>&</b>"}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": '{"celsius": 12}'},
    {"role": "assistant", "content": "12 °C.", "reasoning_content": "The tool says so."},
    {"role": "user", "content": "  Danke \n"},
]


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    """One process for all templates of these tests."""
    shared = ChatRenderer()
    yield shared
    shared.close()


@pytest.fixture
def opened(tmp_path: Path, renderer: ChatRenderer) -> Callable[[str], ChatTemplate]:
    """Returns a function that opens a checkpoint folder whose chat template is the given text."""

    def open_template(text: str) -> ChatTemplate:
        write_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(text, encoding="utf-8")
        found = ChatTemplate.open(tmp_path, AutoTokenizer.from_pretrained(tmp_path), renderer)
        assert found is not None
        return found

    return open_template


def published(name: str) -> str:
    """Returns a published template from the wheel of trl; skips the test where it is not installed."""
    found = importlib.util.find_spec("trl")
    if found is None or not found.submodule_search_locations:
        pytest.skip("trl is not installed, whose wheel has published chat templates")
    return Path(found.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text("utf-8")


def of_mistral_common() -> str:
    """Returns the template that mistral-common 1.13 (Apache-2.0) makes for version 7; skips where it is not installed."""
    if importlib.util.find_spec("mistral_common") is None:
        pytest.skip("mistral-common is not installed, which generates Mistral's chat templates")
    from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return build_chat_template(TemplateConfig(version=TokenizerVersion.v7, spm=True))


def reference(folder: Path, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """Returns what transformers renders in this process, with arguments as objects; None if the template refuses."""
    plain = json.loads(json.dumps(messages))
    for message in plain:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    try:
        return AutoTokenizer.from_pretrained(folder).apply_chat_template(plain, tokenize=False, **options)
    except Exception:
        return None


@pytest.mark.parametrize("source", [*PUBLISHED, "mistral-like", "mistral-common"])
def test_the_text_is_that_of_transformers(opened: Callable, tmp_path: Path, source: str) -> None:
    """For published templates of every family the text equals transformers', and what they refuse is INVALID."""
    texts = {"mistral-like": lambda: MISTRAL, "mistral-common": of_mistral_common}
    template = opened(texts[source]() if source in texts else published(source))
    rendered = 0
    for messages in (CONVERSATION, CONVERSATION[:2], [USER], CONVERSATION[1:3]):
        for options in (
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
            {"add_generation_prompt": True, "tools": TOOLS},
            {"add_generation_prompt": True, "enable_thinking": False, "reasoning_effort": "high"},
        ):
            known = {name: options[name] for name in ("add_generation_prompt", "tools") if name in options}
            more = {name: value for name, value in options.items() if name not in known}
            wanted = reference(tmp_path, messages, **options)
            if wanted is None:
                with pytest.raises(InvalidRequest, match=r"what the model's chat template takes"):
                    template.render(messages, **known, arguments=more)
            else:
                assert template.render(messages, **known, arguments=more) == wanted
                rendered += 1
    assert rendered >= 4


def test_the_synthetic_chat_checkpoint(tmp_path: Path, renderer: ChatRenderer) -> None:
    """`write_chat_tokenizer` writes ChatML with tools in the Hermes format; its markers are tokens."""
    write_chat_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    template = ChatTemplate.open(tmp_path, tokenizer, renderer)
    assert template is not None
    text = template.render(CONVERSATION, tools=TOOLS)
    assert text == reference(tmp_path, CONVERSATION, tools=TOOLS, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"' in text
    assert "<tool_response>" in text
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == ids[0]
    assert tokenizer.decode(ids) == text


def test_continuing_the_last_message(opened: Callable, tmp_path: Path) -> None:
    """With `continue_final_message` the text ends within the last message; it excludes a generation prompt."""
    template = opened("{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}")
    begun = [USER, {"role": "assistant", "content": "It is"}]
    text = template.render(begun, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<assistant>It is")
    assert text == reference(tmp_path, begun, continue_final_message=True)
    with pytest.raises(InvalidRequest, match=r"continue_final_message"):
        template.render(begun, continue_final_message=True)


def test_forms_of_content(opened: Callable) -> None:
    """Text parts become one text where the template wants texts; a text becomes a part where it wants parts."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    plain = opened("{% for m in messages %}{{ m.content }}|{% endfor %}")
    assert plain.render([{"role": "user", "content": parts}]) == "one\ntwo|"
    assert plain.render([{"role": "user", "content": []}]) == "|"
    listing = opened(PARTS_ONLY)
    assert listing.render([{"role": "user", "content": parts}]) == "<one><two>"
    assert listing.render([{"role": "user", "content": "one"}]) == "<one>"
    either = opened(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}|{% endfor %}"
    )
    assert either.render([{"role": "user", "content": parts}]) == "onetwo|"
    assert either.render([{"role": "user", "content": "one"}]) == "one|"


def test_the_role_developer(opened: Callable) -> None:
    """`developer` is `system` in a template that does not know it, and stays where the template names it."""
    messages = [{"role": "developer", "content": "x"}, USER]
    assert opened("{{ messages[0].role }}").render(messages) == "system"
    assert opened("{{ messages[0].role if messages[0].role == 'developer' }}").render(messages) == "developer"


def test_several_templates(tmp_path: Path, renderer: ChatRenderer) -> None:
    """Of several templates the one for tools is taken where there are tools; `text` holds both."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("with tools")
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("with documents")
    template = ChatTemplate.open(tmp_path, AutoTokenizer.from_pretrained(tmp_path), renderer)
    assert template is not None
    assert (template.render([USER]), template.render([USER], tools=TOOLS)) == ("plain", "with tools")
    assert template.text == "plain\nwith tools"


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("from the config", "from the config"),
        ([{"name": "default", "template": "from a list"}, {"name": "rag", "template": "x"}], "from a list"),
    ],
)
def test_where_templates_are(tmp_path: Path, renderer: ChatRenderer, form: Any, wanted: str) -> None:
    """They are read from tokenizer_config.json as text or list, else from chat_template.json; without one there is none."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert ChatTemplate.open(tmp_path, tokenizer, renderer) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from the processor"}))
    for expected in ("from the processor", wanted):
        template = ChatTemplate.open(tmp_path, AutoTokenizer.from_pretrained(tmp_path), renderer)
        assert template is not None
        assert template.render([USER]) == expected
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": form}))


def test_a_template_that_does_not_compile(opened: Callable) -> None:
    """It is a damaged checkpoint, with the line of the mistake."""
    with pytest.raises(CheckpointError, match=r"chat template default does not compile: line 2: "):
        opened("{{ messages }}\n{% for %}")


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], r"messages = \[\]: must be at least one message"),
        (["x"], r"messages\[0\] = 'x': must be an object"),
        ([{"content": "x"}], r"messages\[0\].role = null: must be one of system, developer, user"),
        ([{"role": "root", "content": "x"}], r"messages\[0\].role = 'root'"),
        ([USER, {"role": "user"}], r"messages\[1\].content = null: must be a text"),
        ([{"role": "assistant"}], r"messages\[0\].content = null"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content = 7: must be a text, or a list of text parts"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\].content\[1\].type = 'image_url': must be text: .* without images, audio or files",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text = null: must be a text"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a'}}]}],
            r"messages\[0\].tool_calls\[0\].function.arguments = .*: must be JSON: ",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
            "must be a JSON object",
        ),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], r"tool_calls\[0\].function.name = null"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogates"),
        ([{"role": "user", "content": "x", "extra": object()}], "must be JSON values"),
    ],
)
def test_messages_that_are_none(opened: Callable, messages: list[Any], complaint: str) -> None:
    """A wrong message is refused with the path of the field that is wrong."""
    with pytest.raises(InvalidRequest, match=complaint):
        opened("{% for m in messages %}{{ m.content }}{% endfor %}").render(messages)


def test_wrong_arguments(opened: Callable) -> None:
    """Arguments reach the template; those that the request states elsewhere are refused, and so are tools that are none."""
    template = opened("{{ effort }}")
    assert template.render([USER], arguments={"effort": 3}) == "3"
    with pytest.raises(InvalidRequest, match=r"chat_template_kwargs.messages"):
        template.render([USER], arguments={"messages": []})
    with pytest.raises(InvalidRequest, match=r"tools\[0\] = 'f': must be an object"):
        template.render([USER], tools=["f"])


def test_what_a_template_refuses(opened: Callable) -> None:
    """`raise_exception` is the client's mistake, with the template's own words; so is a variable that is missing."""
    with pytest.raises(InvalidRequest, match=r"what the model's chat template takes: Roles must alternate"):
        opened("{{ raise_exception('Roles must alternate') }}").render([USER])
    with pytest.raises(InvalidRequest, match=r"'nothing' is undefined"):
        opened("{{ nothing.below }}").render([USER])


@pytest.mark.parametrize(
    "hostile",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(l=[1]) %}{% for a in range(99) %}{% set n.l = n.l + n.l %}{% endfor %}",
        "{{ messages[0].content * 10 ** 10 }}",
        "{{ '%0999999999d' % messages | length }}",
        "{{ (99 ** messages[0].content | length) ** 9999999 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ messages[0].content * 40000000 }}",
    ],
)
def test_a_hostile_template_is_bounded(opened: Callable, hostile: str) -> None:
    """Endless loops, huge texts and deep recursion end soon as an error, and the next rendering works."""
    template = opened("{% if messages[0].content == 'x' %}" + hostile + "{% else %}fine{% endif %}")
    began = time.monotonic()
    with pytest.raises(
        (InvalidRequest, ResourceExhausted), match=r"takes more than|took longer|calls itself too deeply"
    ):
        template.render([{"role": "user", "content": "x"}])
    assert time.monotonic() - began < 2 * WALL_S
    assert template.render([USER]) == "fine"


def test_no_way_out_of_the_sandbox(opened: Callable) -> None:
    """Python's internals and changes of what is passed are out of a template's reach."""
    for escape in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}"):
        with pytest.raises(InvalidRequest, match=r"unsafe|not safely callable|undefined"):
            opened(escape).render([USER])


def test_the_process_ends_with_the_template(opened: Callable, renderer: ChatRenderer) -> None:
    """`close` ends the process that renders, and a later rendering starts another one."""
    template = opened("{{ messages | length }}")
    before = children()  # also those of templates of other tests
    template.close()
    assert len(before - children()) == 1
    assert template.render([USER]) == "1"


def children() -> set[int]:
    """Returns the processes that this one has started and that render templates."""
    own = Path(f"/proc/{os.getpid()}/task")
    found = {int(pid) for task in own.iterdir() for pid in (task / "children").read_text().split()}
    return {pid for pid in found if b"chat_renderer" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_a_long_conversation(opened: Callable) -> None:
    """Ten megabytes of messages are rendered."""
    template = opened("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert len(template.render([{"role": "user", "content": "word " * 2000}] * 1000)) == 10_000_000
