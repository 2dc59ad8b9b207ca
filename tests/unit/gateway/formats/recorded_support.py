"""Outputs in the format of each family, written after the published descriptions, with the pieces that they stand for.

The sources are named in the docstrings of `moiety.gateway.formats`.
"""

from __future__ import annotations

from dataclasses import dataclass

from moiety.gateway.formats.pieces import CallArguments, CallBegins, Content, Piece, Reasoning

PARIS = '{"city": "Paris"}'


@dataclass(frozen=True, slots=True)
class Recorded:
    """One output. `case` says what is special about it."""

    format: str
    case: str
    text: str
    pieces: tuple[Piece, ...]
    tools: bool = True
    reasoning_open: bool = False

    def __str__(self) -> str:
        return f"{self.format}: {self.case}"


def call(name: str, arguments: str, index: int = 0) -> tuple[Piece, ...]:
    """Returns the pieces of one call; its id is its index."""
    return CallBegins(index, f"call_{index}", name), CallArguments(index, arguments)


WEATHER = call("get_weather", PARIS)
TIME = call("get_time", '{"zone": "Europe/Paris"}', 1)

HERMES = (
    Recorded("hermes", "text alone", "Hello < there, 2 <tool.", (Content("Hello < there, 2 <tool."),)),
    Recorded(
        "hermes",
        "Qwen2.5: text, then a call",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        (Content("Let me look."), *WEATHER),
    ),
    Recorded(
        "hermes",
        "Qwen3: reasoning, two calls",
        "<think>\nBoth, then.\n</think>\n\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}\n</tool_call>',
        (Reasoning("Both, then."), *WEATHER, *TIME),
    ),
    Recorded(
        "hermes",
        "Qwen3-Thinking: the prompt opens the reasoning",
        "It is <b>sunny</b>?\n\nYes.\n</think>\n\nSunny.",
        (Reasoning("It is <b>sunny</b>?\n\nYes."), Content("Sunny.")),
        reasoning_open=True,
    ),
    Recorded("hermes", "Qwen3 without thinking", "<think>\n\n</think>\n\nSunny.\n", (Content("Sunny.\n"),)),
    Recorded(
        "hermes",
        "arguments with markers, brackets and quotes",
        '<tool_call>{"name": "run", "arguments": {"code": "a[\\"}\\"] </tool_call> \\\\", "n": [1, {}]}}</tool_call>Done.',
        (*call("run", '{"code": "a[\\"}\\"] </tool_call> \\\\", "n": [1, {}]}'), Content("Done.")),
    ),
    Recorded(
        "hermes",
        "arguments before the name",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>',
        WEATHER,
    ),
    Recorded(
        "hermes",
        "arguments as a string",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        WEATHER,
    ),
    Recorded("hermes", "no arguments", '<tool_call>\n{"name": "get_time"}\n</tool_call>', call("get_time", "{}")),
    Recorded(
        "hermes",
        "a bracket too many, a stray mark",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}}\n</tool_call>\n</tool_call> Bye',
        (*WEATHER, Content("Bye")),
    ),
    Recorded(
        "hermes",
        "no closing mark",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}\n\nI asked.',
        (*WEATHER, Content("I asked.")),
    ),
    Recorded(
        "hermes",
        "no JSON",
        "So:\n<tool_call>\nget_weather(Paris)\n</tool_call>",
        (Content("So:\n<tool_call>\nget_weather(Paris)\n</tool_call>"),),
    ),
    Recorded(
        "hermes",
        "a name that no tool can have",
        '<tool_call>{"name": "get weather", "arguments": {}}</tool_call>',
        (Content('<tool_call>{"name": "get weather", "arguments": {}}</tool_call>'),),
    ),
    Recorded(
        "hermes",
        "cut off in the arguments",
        'Hm.<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa',
        (Content("Hm."), *call("get_weather", '{"city": "Pa')),
    ),
    Recorded(
        "hermes",
        "cut off in the name",
        'Hm.\n<tool_call>\n{"name": "get_w',
        (Content('Hm.\n<tool_call>\n{"name": "get_w'),),
    ),
    Recorded("hermes", "cut off in the marker", "Hm. \n<tool_c", (Content("Hm. \n<tool_c"),)),
    Recorded("hermes", "cut off in the reasoning", "<think>\nHm, </thi", (Reasoning("Hm, </thi"),)),
    Recorded(
        "hermes",
        "no tools",
        '<think>Hm</think><tool_call>{"name": "f"}</tool_call>',
        (Reasoning("Hm"), Content('<tool_call>{"name": "f"}</tool_call>')),
        tools=False,
    ),
)
LLAMA = (
    Recorded("llama", "text alone", "Sunny; {at} noon.<|eot_id|>", (Content("Sunny; {at} noon."),)),
    Recorded("llama", "one call", '{"name": "get_weather", "parameters": {"city": "Paris"}}<|eot_id|>', WEATHER),
    Recorded(
        "llama",
        "a tag and a type, then another call",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_time", "parameters": {"zone": "Europe/Paris"}}<|eom_id|>',
        (*WEATHER, *TIME),
    ),
    Recorded(
        "llama",
        "text before the tag",
        'Let me look.\n<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}',
        (Content("Let me look."), *WEATHER),
    ),
    Recorded(
        "llama", "JSON for the user", '{"city": "Paris", "name": "x"}', (Content('{"city": "Paris", "name": "x"}'),)
    ),
    Recorded("llama", "an object with a name alone", '{"name": "Ada"}', (Content('{"name": "Ada"}'),)),
    Recorded("llama", "code", '<|python_tag|>f.call(query="x")<|eom_id|>', (Content('f.call(query="x")'),)),
    Recorded(
        "llama", "text after a call", '{"name": "f", "parameters": {}}; ok?', (*call("f", "{}"), Content("; ok?"))
    ),
    Recorded("llama", "cut off in the parameters", '{"name": "f", "parameters": {"a": [1', call("f", '{"a": [1')),
    Recorded("llama", "cut off before them", ' {"name": "f", "para', (Content(' {"name": "f", "para'),)),
)
LLAMA4 = (
    Recorded(
        "llama4",
        "two calls in a list",
        "[get_weather(city=\"Paris\"), get_time(zone='Europe/Paris')]<|eot|>",
        (*WEATHER, *TIME),
    ),
    Recorded(
        "llama4",
        "between marks, with literals of every kind",
        '<|python_start|>[f(a=True, b=None, c=[1, -2.5e3,], d={"k": (1, "x")}, e=\'it\\\'s "\\u00e9"\')]<|python_end|><|eom|>',
        call("f", '{"a": true, "b": null, "c": [1, -2.5e3], "d": {"k": [1, "x"]}, "e": "it\'s \\"\\u00e9\\""}'),
    ),
    Recorded("llama4", "no arguments", "[now()]", call("now", "{}")),
    Recorded("llama4", "one call in JSON", '{"name": "get_weather", "parameters": {"city": "Paris"}}', WEATHER),
    Recorded("llama4", "a list for the user", "[1, 2, three(3)]", (Content("[1, 2, three(3)]"),)),
    Recorded("llama4", "an expression", "[f(a=1, b=x + 1)]", (*call("f", '{"a": 1'), Content("x + 1)]"))),
    Recorded("llama4", "cut off", '[f(a=1, b="x', call("f", '{"a": 1')),
)
MISTRAL = (
    Recorded("mistral", "text alone", "Sunny [TOOL].</s>", (Content("Sunny [TOOL]."),)),
    Recorded(
        "mistral",
        "v3: a list of two",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_time", "arguments": {"zone": "Europe/Paris"}}]</s>',
        (*WEATHER, *TIME),
    ),
    Recorded(
        "mistral_args",
        "v13: names and arguments",
        'Let me look. [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{"zone": "Europe/Paris"}</s>',
        (Content("Let me look."), *WEATHER, *TIME),
    ),
    Recorded("mistral_args", "v11: an id", '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}', WEATHER),
    Recorded("mistral_args", "without the second marker", '[TOOL_CALLS]get_weather{"city": "Paris"}', WEATHER),
    Recorded(
        "mistral_args",
        "Magistral",
        '[THINK]Where?\nParis.[/THINK]It is [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}',
        (Reasoning("Where?\nParis."), Content("It is"), *WEATHER),
    ),
    Recorded("mistral", "no call after the marker", "[TOOL_CALLS] I can't.", (Content("[TOOL_CALLS] I can't."),)),
    Recorded(
        "mistral",
        "an item that is no call",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, 5]',
        (*WEATHER, Content(", 5]")),
    ),
    Recorded("mistral", "cut off in the list", '[TOOL_CALLS] [{"name"', (Content('[TOOL_CALLS] [{"name"'),)),
    Recorded("mistral_args", "cut off after the name", "Hm [TOOL_CALLS]f[AR", (Content("Hm [TOOL_CALLS]f[AR"),)),
    Recorded("mistral_args", "cut off after the marker", "Hm [TOOL_CALLS]", (Content("Hm [TOOL_CALLS]"),)),
    Recorded("mistral_args", "cut off in the arguments", '[TOOL_CALLS]f[ARGS]{"a": "', call("f", '{"a": "')),
)
DEEPSEEK = (
    Recorded("deepseek", "text alone", "Sunny <｜ today.<｜end▁of▁sentence｜>", (Content("Sunny <｜ today."),)),
    Recorded(
        "deepseek",
        "R1: reasoning and one call",
        "Hm.\n</think>\n\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        (Reasoning("Hm."), *WEATHER),
        reasoning_open=True,
    ),
    Recorded(
        "deepseek",
        "V3: text and two calls",
        "Both:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n'
        '{"zone": "Europe/Paris"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        (Content("Both:"), *WEATHER, *TIME),
    ),
    Recorded(
        "deepseek_v31",
        "V3.1: two calls",
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{"zone": "Europe/Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        (*WEATHER, *TIME),
    ),
    Recorded(
        "deepseek_v31",
        "a tool called function",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>{"a": "<｜"}<｜tool▁call▁end｜>',
        call("function", '{"a": "<｜"}'),
    ),
    Recorded(
        "deepseek_v31",
        "no arguments where they should be",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>x<｜tool▁call▁end｜> So.",
        (Content("<｜tool▁call▁begin｜>f<｜tool▁sep｜>xSo."),),
    ),
    Recorded(
        "deepseek_v31",
        "arguments that end in the middle of a string",
        '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": "b<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}',
        (*call("f", '{"a": "b'), *call("g", "{}", 1)),
    ),
    Recorded(
        "deepseek", "cut off in a head", "Hm <｜tool▁call▁begin｜>func", (Content("Hm <｜tool▁call▁begin｜>func"),)
    ),
)
GPT_OSS = (
    Recorded(
        "gpt_oss",
        "an answer",
        "<|channel|>analysis<|message|>2 + 2, simple.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>2 + 2 = 4.\n<|return|>",
        (Reasoning("2 + 2, simple."), Content("2 + 2 = 4.\n")),
    ),
    Recorded(
        "gpt_oss",
        "a call",
        "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        (Reasoning("Look."), *WEATHER),
    ),
    Recorded(
        "gpt_oss",
        "the recipient first, and a call after it",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>'
        '<|start|>assistant to=functions.get_time<|channel|>commentary<|message|>{"zone": "Europe/Paris"}',
        (*WEATHER, *TIME),
    ),
    Recorded(
        "gpt_oss",
        "a preamble",
        "<|channel|>commentary<|message|>I look first.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.now<|message|><|call|>",
        (Content("I look first."), *call("now", "{}")),
    ),
    Recorded(
        "gpt_oss",
        "a tool that is built in",
        "<|channel|>analysis to=python code<|message|>print(1)<|call|>",
        (Reasoning("print(1)"),),
    ),
    Recorded("gpt_oss", "no header", "Sunny <| today.", (Content("Sunny <| today."),)),
    Recorded(
        "gpt_oss",
        "no end of a message",
        "<|channel|>analysis<|message|>A<|channel|>final<|message|>B",
        (Reasoning("A"), Content("B")),
    ),
    Recorded("gpt_oss", "cut off in a header", "<|channel|>final<|message|>A<|end|><|start|>assi", (Content("A"),)),
    Recorded(
        "gpt_oss",
        "the prompt opens the reasoning",
        "A<|end|><|start|>assistant<|channel|>final<|message|>B",
        (Reasoning("A"), Content("B")),
        reasoning_open=True,
    ),
    Recorded(
        "gpt_oss",
        "no tools",
        "<|channel|>commentary to=functions.f<|message|>{}<|call|>",
        (Content("{}"),),
        tools=False,
    ),
)
PLAIN = (
    Recorded(
        "plain",
        "reasoning",
        "<think>A </b\n</think> B <think>C</think>",
        (Reasoning("A </b"), Content("B <think>C</think>")),
    ),
    Recorded("plain", "no reasoning", " <thin air", (Content(" <thin air"),)),
    Recorded("plain", "space alone", " \n", (Content(" \n"),)),
)
RECORDED = (*HERMES, *LLAMA, *LLAMA4, *MISTRAL, *DEEPSEEK, *GPT_OSS, *PLAIN)
