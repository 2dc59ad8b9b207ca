"""Which tensors of a checkpoint no model reads, by their names alone. Imports neither torch nor transformers."""

from __future__ import annotations

import re

from moiety.model.checkpoint.checkpoint import Checkpoint
from moiety.model.checkpoint.side_files import text_config

# Patterns of tensors that may be left over: each is searched in the published name of a tensor that becomes no weight.
UNUSED = (
    # Towers of images, video and sound, and what joins them to the text model: only text is served.
    r"(^|\.)(visual|vision|vision_(model|tower|encoder|adapter|embed_tokens)|audio_(model|tower|encoder)|vit_\w+)\.",
    r"(^|\.)(multi_modal_projector|mm_projector|embed_vision|embed_audio|image_newline|talker|code2wav|token2wav)(\.|$)",
    # Computed from the config.
    r"(^|\.)rotary_emb\.inv_freq$",
    # Scales of a quantised KV cache and of quantised activations: both stay in the model's dtype.
    r"\.(k|v|kv|q|prob)_scale$",
    r"\.(input|activation)_scale$",
    r"\.(q|k|v)_proj\.output_scale$",
)
# Layers that predict several tokens at once, for speculative decoding, have names like `mtp`. DeepSeek-V3, GLM-4.5 and others
# number them on from the model's last layer instead; of all layers, only they have an `eh_proj`.
_MULTI_TOKEN = re.compile(r"(^|\.)mtp(_\w+)?\.")
_LAYER = re.compile(r"(.*\.)?layers\.(\d+)\.")
_NEVER_READ = re.compile("|".join(UNUSED))


def is_never_read(checkpoint: Checkpoint, name: str) -> bool:
    """Returns whether the tensor `name` is one that no model of this kind reads. A model may leave out further ones."""
    return _NEVER_READ.search(name) is not None or predicts_several_tokens(checkpoint, name)


def predicts_several_tokens(checkpoint: Checkpoint, name: str) -> bool:
    """Returns whether the tensor `name` is of a layer that predicts several tokens at once, which no trunk has."""
    if _MULTI_TOKEN.search(name):
        return True
    layers = text_config(checkpoint.config).get("num_hidden_layers") or 0
    layer = _LAYER.match(name)
    return layer is not None and int(layer[2]) >= layers and f"{layer[0]}eh_proj.weight" in checkpoint.tensors
