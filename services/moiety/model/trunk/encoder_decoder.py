"""Runs an encoder-decoder as if it were a decoder: the batch carries new prompts, which go through the encoder first.

One pass encodes the prompts of new sequences and computes tokens of all sequences. A sequence's encoded prompt is needed in
that pass only: every decoder layer turns it into keys and values, which are cached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moiety.errors import HopFailed
from moiety.model.architectures.transformers_model import load_config, unsupported
from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.side_files import GENERATION_FILE, read_side_file
from moiety.model.seam import ModuleFact, current_batch, current_context, current_prompts

ATTENDS_TO_PROMPT = ModuleFact[bool]("attends_to_prompt")  # of the decoder's attention modules that do
_CROSS_ATTENTION_NAMES = ("EncDecAttention", "cross_attention")  # transformers' names of these modules
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class DecoderStart:
    """The tokens at the start of an encoder-decoder's output."""

    token: int  # the decoder's first input token
    first_token: int | None = None  # the forced first output token, unless a request states another

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> DecoderStart | None:
        """Reads the start tokens as transformers' `generate` does; returns None if the model has no encoder.

        Raises CheckpointError if no config states the decoder's first input token.
        """
        config = load_config(checkpoint)
        if not config.is_encoder_decoder:
            return None
        generation_config = read_side_file(checkpoint.path, GENERATION_FILE)

        def value(name: str) -> int | None:
            found: int | None = generation_config.get(name, getattr(config, name, None))
            return found

        token = value("decoder_start_token_id")
        token = value("bos_token_id") if token is None else token
        if token is None:
            raise unsupported(checkpoint, "its configs have no decoder_start_token_id and no bos_token_id")
        first = value("forced_bos_token_id")
        vocabulary = config.get_text_config().vocab_size
        for name, token_id in (("decoder_start_token_id", token), ("forced_bos_token_id", first)):
            if token_id is not None and not 0 <= token_id < vocabulary:
                raise unsupported(checkpoint, f"its {name} is {token_id}: must be from 0 to {vocabulary - 1}")
        return cls(token, first)


class EncoderDecoder(nn.Module):
    """A loaded encoder-decoder that is called like a causal language model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, self.config = model, model.config
        model.lm_head.register_forward_pre_hook(_keep_wanted)
        for path, module in model.named_modules():
            if hasattr(module, "create_position_ids_from_input_ids"):
                _use_row_positions(module)
            if path.rpartition(".")[2] in _CROSS_ATTENTION_NAMES:
                ATTENDS_TO_PROMPT.set(module, True)
                for name, child in module.named_children():
                    if name in _KEYS_AND_VALUES:
                        _skip_without_prompts(child)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor | None = None, **_: Any) -> Any:
        """Computes logits [1, R, V] in `.logits`, for the R tokens `logits_to_keep` (default: all) of `input_ids` [1, T].

        Runs inside a `forward_context` whose batch has the prompts to encode. Ignores the other arguments of a causal
        language model. Raises HopFailed, which names tokens by their index in `input_ids`.
        """
        from transformers.modeling_outputs import MoEModelOutput

        encoded = self._encoded()
        current_context().wanted = logits_to_keep
        return self.model(
            encoder_outputs=MoEModelOutput(last_hidden_state=encoded), decoder_input_ids=input_ids, use_cache=False
        )

    def _encoded(self) -> torch.Tensor:
        """Returns the encoder's output [1, E, D] for the batch's E prompt tokens; zeros [1, 1, D] if there are none."""
        prompts, context = current_prompts(), current_context()
        embedding = self.model.get_input_embeddings().weight
        if not len(prompts.ids):  # a row that is not used, because modules cannot reshape an empty one
            return embedding.new_zeros(1, 1, embedding.shape[1])
        context.encoding = prompts.lengths
        try:
            ids = prompts.ids[None].to(embedding.device)
            output: torch.Tensor = self.model.get_encoder()(input_ids=ids).last_hidden_state
        except HopFailed as failed:
            raise HopFailed(prompts.owners(failed.tokens), failed.cause) from failed
        finally:
            context.encoding = None
        return output


def _keep_wanted(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Forward pre-hook of the output layer: keeps only the hidden states of tokens whose logits are wanted."""
    wanted = current_context().wanted
    return arguments if wanted is None else (arguments[0][:, wanted],)


def _skip_without_prompts(projection: Any) -> None:
    """Makes `projection` (encoded prompts to keys or values) compute nothing in passes that have no new prompts."""
    compute = projection.forward

    def forward(encoded: torch.Tensor) -> torch.Tensor:
        if not current_prompts().lengths:
            return encoded.new_empty(*encoded.shape[:-1], projection.out_features)
        projected: torch.Tensor = compute(encoded)
        return projected

    projection.forward = forward


def _use_row_positions(module: Any) -> None:
    """Makes a position embedding use each token's position in its own sequence, not in the whole pass."""
    padding: int = module.padding_idx
    if (needed := module.num_positions + padding + 1) > module.weights.shape[0]:
        module.make_weights(needed, module.embedding_dim, padding)

    def forward(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        lengths = current_context().encoding
        if lengths is not None:  # padding in a prompt gets no position, as in transformers
            prompts = input_ids.split(lengths, dim=1)
            places = torch.cat([module.create_position_ids_from_input_ids(ids, padding) for ids in prompts], dim=1)
        else:
            positions = current_batch().positions.to(input_ids.device)
            places = torch.where(input_ids == padding, padding, positions + padding + 1)
        embedded: torch.Tensor = module.weights[places]
        return embedded

    module.forward = forward
