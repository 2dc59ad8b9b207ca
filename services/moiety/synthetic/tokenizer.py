"""Real tokenizers of at most 320 tokens for random checkpoints: byte-level BPE, and tokenizers like T5's and NLLB's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

VOCABULARY = 320
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LANGUAGES = ("eng_Latn", "fra_Latn")  # NLLB's source language and a target language
_CORPUS = (
    "The router runs attention and gating, and the experts run where there is room for them.",
    "Each expert group is a service of its own: it grows when it is hot and shrinks when it is not.",
    "An expert that is lost costs no request, for another holder answers in its place.",
)


def write_tokenizer(folder: Path) -> None:
    """Saves a byte-level BPE tokenizer to `folder` for `AutoTokenizer`: 3 special tokens, 256 bytes, 61 merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        chat_template=CHAT_TEMPLATE,
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special_tokens = [*special.values(), *languages]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special_tokens, unk_token=special["unk_token"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    special_ids = [(token, tokenizer.token_to_id(token)) for token in special_tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special_ids)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=list(languages), **special
    ).save_pretrained(folder)
