"""The text that plain transformers gives for an output: what streamed text is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def reference_text(tokenizer: Any, before: Sequence[int], output: Sequence[int]) -> str:
    """Returns what decode(before + output) has after decode(before), decoding each as a whole, without special tokens.

    Where the output changes the end of decode(before), because it completes a character, it is what follows their longest
    common prefix.
    """
    shown, text = (
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (before, [*before, *output])
    )
    while not text.startswith(shown):
        shown = shown[:-1]
    return str(text[len(shown) :])
