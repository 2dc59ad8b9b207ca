"""Converts a SentencePiece model, `tokenizer.model`, to a tokenizer of the library `tokenizers` that gives the same token ids.

transformers converts such files too, but in 5.23 its ids differ from the published ones: it leaves out the space before a
text, the begin-of-sequence token, or the scores by which pieces are merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moiety.errors import CheckpointError
from moiety.model.checkpoint.files import AGAIN, unreadable

SPACE = "▁"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of pieces, of sentencepiece_model.proto
_CHARACTERS = "".join(map(chr, (*range(1, 0xD800), *range(0xE000, 0x10000))))  # a damaged table may fail at any of them
UNIGRAM, BPE = 1, 2  # types of models, likewise


def read_sentencepiece(file: Path) -> Any:
    """Reads a SentencePiece ModelProto. Raises CheckpointError if the file holds none that can be converted."""
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf  # two copies of these messages exclude each other

    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file}: {unreadable(error)}") from None
    except DecodeError:
        raise CheckpointError(f"{file}: not readable as a SentencePiece model: {AGAIN}") from None
    if not model.pieces:
        raise CheckpointError(f"{file}: not a SentencePiece model: it has no pieces")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    try:
        with no_panics():
            normalizers.Sequence(_normalizing(model)).normalize_str(_CHARACTERS)
    except Exception:  # tokenizers raises nothing more specific
        table = "its table of characters (precompiled_charsmap) is damaged"
        raise CheckpointError(f"{file}: not readable as a SentencePiece model: {table}: {AGAIN}") from None
    if trainer.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(f"{file}: model_type is {trainer.model_type}: must be 1 (unigram) or 2 (BPE)")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise CheckpointError(f"{file}: spaces are not written as {SPACE} before words, which is not supported")
    return model


@contextmanager
def no_panics() -> Iterator[None]:
    """Turns a panic of the library `tokenizers`, which is no Exception, into ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def named_tokens(model: Any) -> Mapping[str, str]:
    """Returns the special tokens that a model names, as the arguments of a tokenizer of transformers."""
    roles = ("unk", "bos", "eos", "pad")
    ids = {f"{role}_token": getattr(model.trainer_spec, f"{role}_id") for role in roles}
    return {name: model.pieces[piece].piece for name, piece in ids.items() if 0 <= piece < len(model.pieces)}


def converted(model: Any, *, space: bool, once: bool) -> Tokenizer:
    """Returns a tokenizer with the ids of `model`. Its control symbols are special tokens: their text in a prompt is them.

    `space`: whether texts get a space before them, if the model says so. `once`: only the beginning of a text gets it; if
    not, so does what follows a special token. SentencePiece does not say which: it knows no special tokens in texts.

    Ids are those of the library sentencepiece, but for what `tokenizers` cannot do: a text that begins with a user-defined
    symbol, or with a space where `once` is true, gets no further space; a combining mark behind a character that NFKC
    changes is lost; of equally likely Unigram pieces it may take others.
    """
    tokenizer = Tokenizer(_bpe(model) if model.trainer_spec.model_type == BPE else _unigram(model))
    steps = _normalizing(model)
    before = space and model.normalizer_spec.add_dummy_prefix
    if before and once:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    elif before:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    shown: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*shown, decoders.Strip(" ", 1, 0)] if before else shown)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=SPACE in piece.piece, special=piece.type == CONTROL)
            for piece in model.pieces
            if piece.type in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer


def _bpe(model: Any) -> models.BPE:
    """Merges of a higher score come first, and of one piece, that of its longest beginning.

    SentencePiece merges by score, and what is further left first.
    """
    vocabulary = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED, UNUSED)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        vocabulary,
        merges,
        unk_token=model.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )


def _unigram(model: Any) -> models.Unigram:
    pieces = [(piece.piece, piece.score) for piece in model.pieces]
    return models.Unigram(pieces, model.trainer_spec.unk_id, model.trainer_spec.byte_fallback)


def _normalizing(model: Any) -> list[Any]:
    """Returns what SentencePiece does to the characters of a text before it writes its spaces."""
    spec = model.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps
