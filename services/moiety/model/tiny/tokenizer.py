"""A real byte-level BPE tokenizer of 320 tokens, so that random checkpoints can be talked to with any text."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 320
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
BOS, EOS, PAD = range(3)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_CORPUS = (
    "The router runs attention and gating, and the experts run where there is room for them.",
    "Each expert group is a service of its own: it grows when it is hot and shrinks when it is not.",
    "An expert that is lost costs no request, for another holder answers in its place.",
)


def write_tokenizer(folder: Path) -> None:
    """Saves the tokenizer to `folder` as `AutoTokenizer` expects it: 3 special tokens, 256 bytes, 61 merges."""
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
