"""The example model's tokenizer: byte-level BPE, trained on equal shares of every domain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moiety.training.corpus import DOMAINS, END, documents, held_out, pieces

VOCABULARY = 4096
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
SAMPLE = 4_000_000  # characters of each domain
# Words with the space before them, digits one by one, indentation in one token, as in Qwen's own.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The model has learned texts, not answers. A conversation is a text whose paragraphs are its messages; it goes on from there.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- message['content'] -}}"
    "{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}{%- endfor -%}"
)


def train_tokenizer(texts: Path, folder: Path) -> Tokenizer:
    """Trains the tokenizer on the texts that are not held out, and writes tokenizer.json and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return tokenizer


def _sample(texts: Path) -> Iterator[str]:
    """Yields SAMPLE characters of every domain, spread over its texts."""
    for domain in DOMAINS:
        cut = (piece for document in documents(texts, domain) for piece in pieces(document))
        learned = [piece for piece in cut if not held_out(piece)]
        step = max(1, sum(map(len, learned)) // SAMPLE)
        yield from learned[::step]
