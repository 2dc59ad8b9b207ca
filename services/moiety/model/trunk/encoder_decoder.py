"""Runs an encoder-decoder as if it were a decoder: prompts that its batch brings along go through the encoder first.

One pass encodes the prompts of sequences that are new and computes tokens of all. A sequence's encoded prompt is needed in
that pass only: every decoder layer turns it into keys and values, which are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from moiety.errors import HopFailed
from moiety.model.architectures.transformers_model import load_config, unsupported
from moiety.model.checkpoint.checkpoint import Checkpoint, read_json
from moiety.model.seam import PackedRow, current_context

CROSS_ATTENTION_ATTRIBUTE = "moiety_cross"  # set on each attention module that looks from the output at the prompt
_ACROSS = ("EncDecAttention", "cross_attention")  # what such modules are called
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class DecoderStart:
    """What the output of an encoder-decoder begins with."""

    token: int  # that the decoder is given before anything of its own
    first_token: int | None = None  # that its output is made to begin with, unless a request says otherwise

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> DecoderStart | None:
        """As `generate` of transformers reads it; None for a decoder. Raises CheckpointError where nothing is said."""
        config = load_config(checkpoint)
        if not config.is_encoder_decoder:
            return None
        file = checkpoint.path / "generation_config.json"
        stated = read_json(file) if file.is_file() else {}

        def value(name: str) -> int | None:
            found: int | None = stated.get(name, getattr(config, name, None))
            return found

        token = value("decoder_start_token_id")
        token = value("bos_token_id") if token is None else token
        if token is None:
            raise unsupported(checkpoint, "its configs say no decoder_start_token_id")
        return cls(token, value("forced_bos_token_id"))


class Prompts(Protocol):
    """What the batch of an encoder-decoder must say of the prompts to be encoded, one after the other in a row [E]."""

    @property
    def ids(self) -> torch.Tensor:
        """int64 [E]."""
        ...

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each prompt; E in all."""
        ...

    def owners(self, tokens: list[int]) -> list[int]:
        """For tokens of these prompts, a token each of the decoder's row whose sequence they belong to."""
        ...


class EncoderDecoder(nn.Module):
    """A loaded encoder-decoder with the call of a causal language model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config
        model.lm_head.register_forward_pre_hook(_only_wanted)
        for path, module in model.named_modules():
            if hasattr(module, "create_position_ids_from_input_ids"):
                _use_row_positions(module)
            if path.rpartition(".")[2] in _ACROSS:
                setattr(module, CROSS_ATTENTION_ATTRIBUTE, True)
                for name, child in module.named_children():
                    if name in _KEYS_AND_VALUES:
                        _spare(child)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        moiety_batch: Any,
        logits_to_keep: torch.Tensor | None = None,
        use_cache: bool = False,
        past_key_values: object = None,
    ) -> Any:
        """Logits [1, R, V] of the decoder tokens `input_ids` [1, T] that are to be kept (default: all), in `.logits`.

        What is kept of tokens is kept through `moiety_batch`, whose `cross` is a Prompts. Runs inside `use_backend`; a
        HopFailed names tokens of the decoder's row.
        """
        from transformers.modeling_outputs import MoEModelOutput

        encoded = self._encoded(moiety_batch)
        prompts = bool(moiety_batch.cross.lengths)
        current_context().row = PackedRow(position_ids[0], wanted=logits_to_keep, prompts=prompts)
        return self.model(
            encoder_outputs=MoEModelOutput(last_hidden_state=encoded),
            decoder_input_ids=input_ids,
            use_cache=False,
            moiety_batch=moiety_batch,
        )

    def _encoded(self, batch: Any) -> torch.Tensor:
        """The encoder's output [1, E, D] for the prompts of the batch."""
        prompts: Prompts = batch.cross
        embedding = self.model.get_input_embeddings().weight
        if not len(prompts.ids):  # a row that nobody looks at: modules cannot reshape an empty one
            return embedding.new_zeros(1, 1, embedding.shape[1])
        ids = prompts.ids[None].to(embedding.device)
        positions = torch.cat([torch.arange(length, device=ids.device) for length in prompts.lengths])
        current_context().row = PackedRow(positions, prompts.lengths)
        try:
            output: torch.Tensor = self.model.get_encoder()(input_ids=ids, moiety_batch=batch).last_hidden_state
        except HopFailed as failed:
            raise HopFailed(prompts.owners(failed.tokens), failed.cause) from failed
        return output


def _only_wanted(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Before the output layer: a vocabulary of logits only for the tokens that want them."""
    row = current_context().row
    wanted = None if row is None else row.wanted
    return arguments if wanted is None else (arguments[0][:, wanted],)


def _spare(projection: Any) -> None:
    """Has the projection of a prompt to keys or values rest while no prompt is handed on: nobody reads its results."""
    compute = projection.forward

    def forward(encoded: torch.Tensor) -> torch.Tensor:
        row = current_context().row
        if row is not None and not row.prompts:
            return encoded.new_empty(*encoded.shape[:-1], projection.out_features)
        projected: torch.Tensor = compute(encoded)
        return projected

    projection.forward = forward


def _use_row_positions(module: Any) -> None:
    """Has an embedding of positions, which counts along what it takes for one sequence, ask the row where a token is."""
    padding: int = module.padding_idx
    if (needed := module.num_positions + padding + 1) > module.weights.shape[0]:
        module.make_weights(needed, module.embedding_dim, padding)

    def forward(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        row = current_context().row
        assert row is not None
        if row.lengths is not None:  # padding in a prompt is passed over, as transformers does
            prompts = input_ids.split(row.lengths, dim=1)
            places = torch.cat([module.create_position_ids_from_input_ids(ids, padding) for ids in prompts], dim=1)
        else:
            places = torch.where(input_ids == padding, padding, row.positions + padding + 1)
        embedded: torch.Tensor = module.weights[places]
        return embedded

    module.forward = forward
