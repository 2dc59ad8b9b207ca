"""A checkpoint's format follows from its chat template and vocabulary."""

from __future__ import annotations

from typing import get_args

import pytest

from moiety.config.options import ToolFormat
from moiety.gateway.formats.format import FORMATS, format_for

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
AS_OBJECT = """<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>"""


@pytest.mark.parametrize(
    ("name", "template", "vocabulary"),
    [
        ("hermes", CHATML + AS_OBJECT, {"<tool_call>"}),
        # Hermes 3 has the vocabulary of Llama 3.1, and its template shows the tools' parameters.
        ("hermes", CHATML + AS_OBJECT + '{"name": "f", "parameters": {}}', {"<|python_tag|>"}),
        ("llama", """{{ '{"name": "' + call.name + '", ' }}{{ '"parameters": ' }}""", {"<|python_tag|>", "<|eom_id|>"}),
        ("llama4", "{% if m.tool_calls %}<|python_start|>{{ m.content }}<|python_end|>", {"<|python_start|>"}),
        ("mistral", "{{ '[TOOL_CALLS] [' }}", {"[TOOL_CALLS]", "[AVAILABLE_TOOLS]"}),
        ("mistral_args", "{{ '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}", {"[TOOL_CALLS]", "[ARGS]"}),
        ("deepseek", "{{ '<｜tool▁calls▁begin｜>' + name + '\n```json\n' }}", {"<｜tool▁sep｜>"}),
        (
            "deepseek_v31",
            "{{ '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}",
            {"<｜tool▁sep｜>"},
        ),
        ("gpt_oss", "<|start|>assistant<|channel|>final<|message|>{{ m.content }}", {"<|channel|>", "<|message|>"}),
        ("plain", CHATML + "{{ '<think>\n' }}", {"a"}),
        ("plain", CHATML, {"<think>", "</think>"}),
        # Formats that no parser reads: calls in XML of Qwen3-Coder and GLM-4.5.
        ("plain", CHATML + "<tool_call>\n<function=f>\n<parameter=a>\narguments", {"<tool_call>", "<think>"}),
        (None, CHATML + "<tool_call>f\n<arg_key>a</arg_key> arguments", {"<tool_call>"}),
        (None, CHATML, {"<tool_call>", "[TOOL_CALLS]"}),  # the template would not tell the model of tools
        (None, "", ()),
    ],
)
def test_the_format_is_that_of_the_template(name: str | None, template: str, vocabulary: set[str]):
    """Markers decide; a format with calls is chosen only if the template renders calls."""
    assert format_for(template, vocabulary) is (FORMATS[name] if name else None)


def test_formats_know_their_names():
    """The settings' name of a format is its own, and all but the plain one have calls."""
    assert {each.name for each in FORMATS.values()} == set(FORMATS)
    assert [name for name, each in FORMATS.items() if not each.has_calls] == ["plain"]
    assert not FORMATS["hermes"].special_tokens
    assert FORMATS["gpt_oss"].special_tokens


def test_the_setting_takes_every_format():
    """`gateway.tool_format` may be auto, none, or any format there is."""
    assert set(get_args(ToolFormat)) == {"auto", "none", *FORMATS}
