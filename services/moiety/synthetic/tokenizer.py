"""Real tokenizers of at most 320 tokens for random checkpoints: byte-level BPE, SentencePiece's BPE, Unigram, WordPiece."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 320
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# ChatML, and tools as the Hermes models and Qwen's have them: a call is JSON between markers, which are tokens of their own.
TURN_BEGIN, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_MARKERS = (
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
)  # tokens, but not special ones: decoding keeps them
TOOL_CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'These functions can be called:\\n<tools>\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '</tools>\\nA call is a line of JSON with name and arguments, in these tags:\\n' }}
    {{- '<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}
                {{- '\\n' }}
            {%- endif %}
            {{- '<tool_call>\\n{"name": ' + call.function.name | tojson }}
            {{- ', "arguments": ' + call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LANGUAGES = ("eng_Latn", "fra_Latn")  # NLLB's source language and a target language
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
_CORPUS = (
    "The router runs attention and gating, and the experts run where there is room for them.",
    "Each expert group is a service of its own: it grows when it is hot and shrinks when it is not.",
    "An expert that is lost costs no request, for another holder answers in its place.",
)


def write_tokenizer(folder: Path) -> None:
    """Saves a byte-level BPE tokenizer to `folder` for `AutoTokenizer`: 3 special tokens, 256 bytes, 61 merges."""
    _save(folder, _byte_level(SPECIAL))


def write_chat_tokenizer(folder: Path) -> None:
    """Saves a tokenizer like that of a chat model with tools to `folder`, and a generation_config.json with its two ends.

    Byte-level BPE: the 3 special tokens, the 2 special ones that frame a turn, 4 other markers, 256 bytes, 55 merges. An output
    ends at `<|im_end|>`, or at the tokenizer's end of sequence.
    """
    from tokenizers import Tokenizer

    markers = (*SPECIAL, TURN_BEGIN, TURN_END, *CHAT_MARKERS)
    form = json.loads(_byte_level(markers).to_str())
    for token in form["added_tokens"]:
        token["special"] = token["content"] not in CHAT_MARKERS
    _save(folder, Tokenizer.from_str(json.dumps(form)), TOOL_CHAT_TEMPLATE)
    ends = [EOS, markers.index(TURN_END)]
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": ends}) + "\n")


def _byte_level(special: Sequence[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer whose first ids are the `special` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def write_sentencepiece_tokenizer(folder: Path) -> None:
    """Saves a tokenizer like Mixtral's to `folder`: BPE on text whose spaces are "▁", and 256 tokens for other bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*SPECIAL, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    form = json.loads(tokenizer.to_str())  # as published, byte tokens are not special
    form["added_tokens"] = [token for token in form["added_tokens"] if token["content"] in SPECIAL]
    _save(folder, Tokenizer.from_str(json.dumps(form)))


def write_wordpiece_tokenizer(folder: Path) -> None:
    """Saves a tokenizer like BERT's to `folder`: words and their parts, of which all but the first begin with "##"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [*SPECIAL, *_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), *_words()]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _save(folder, tokenizer)


def _words() -> list[str]:
    return sorted({word for text in _CORPUS for word in re.findall(r"\w\w+", text)})


def _save(folder: Path, tokenizer: Tokenizer, chat_template: str = CHAT_TEMPLATE) -> None:
    """Saves a tokenizer whose first ids are SPECIAL to `folder` for `AutoTokenizer`."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        chat_template=chat_template,
    ).save_pretrained(folder)


def write_t5_tokenizer(folder: Path) -> None:
    """Saves a tokenizer like T5's to `folder`: a text becomes Unigram pieces, then `</s>`. Has no chat template."""
    _write_pieces(folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", template="$A </s>")


def write_nllb_tokenizer(folder: Path) -> None:
    """Saves a tokenizer like NLLB's to `folder`: a text becomes the source language's token, Unigram pieces, then `</s>`."""
    _write_pieces(
        folder,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        template=f"{LANGUAGES[0]} $A </s>",
        languages=LANGUAGES,
    )


def _write_pieces(folder: Path, *, template: str, languages: Sequence[str] = (), **special: str) -> None:
    """Saves a Unigram tokenizer whose first ids are the `special` tokens in order, then the languages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special_tokens = [*special.values(), *languages]
    # Built, not trained: the trainers of Unigram and WordPiece give other pieces in every run.
    pieces = [*((piece, -8.0) for piece in ("▁", *_CHARACTERS)), *((f"▁{word}", -4.0) for word in _words())]
    unknown = special_tokens.index(special["unk_token"])
    tokenizer = Tokenizer(models.Unigram([*((token, 0.0) for token in special_tokens), *pieces], unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special_ids = [(token, tokenizer.token_to_id(token)) for token in special_tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_ids)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=list(languages), **special
    ).save_pretrained(folder)
