"""Writes a Qwen3-MoE checkpoint folder (bfloat16 safetensors) as one GGUF file that has no tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
LAYER_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_TENSORS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_gguf(checkpoint: Path, file: Path) -> None:
    """Writes the checkpoint to `file`, which appears only when it is complete.

    Raises ValueError where the checkpoint is not a Qwen3-MoE in bfloat16.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    if config["model_type"] != "qwen3_moe":
        raise ValueError(f"{config['model_type']}: only qwen3_moe can be written as GGUF here")
    part = file.with_suffix(".part")
    writer = gguf.GGUFWriter(part, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE])
    _write_header(writer, config)
    tensors = dict(_read_tensors(checkpoint))
    _add(writer, "token_embd.weight", tensors["model.embed_tokens.weight"])
    _add(writer, "output_norm.weight", tensors["model.norm.weight"])
    if not config.get("tie_word_embeddings"):
        _add(writer, "output.weight", tensors["lm_head.weight"])
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for name, into in LAYER_TENSORS.items():
            _add(writer, f"blk.{layer}.{into}.weight", tensors[f"{prefix}.{name}.weight"])
        for name, into in EXPERT_TENSORS.items():
            experts = [tensors[f"{prefix}.mlp.experts.{e}.{name}.weight"] for e in range(_experts(config))]
            _add(writer, f"blk.{layer}.{into}.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(file)


def _write_header(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(_experts(config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _experts(config: dict[str, Any]) -> int:
    """Returns the experts per layer. The config's key is `num_experts` or, if transformers saved it, `num_local_experts`."""
    return int(config.get("num_experts") or config["num_local_experts"])


def _read_tensors(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each tensor's name and bfloat16 bits, as uint16 in the published shape, memory-mapped from the files.

    Raises ValueError for another dtype than BF16.
    """
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        data = np.memmap(file, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{file}: {name} is {entry['dtype']}, must be BF16")
            start, end = entry["data_offsets"]
            yield name, data[start:end].view(np.uint16).reshape(entry["shape"])


def _add(writer: gguf.GGUFWriter, name: str, bits: np.ndarray) -> None:
    """Adds norms and gates in float32, as llama.cpp's own converter does, and all other tensors unchanged."""
    if bits.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
    else:
        writer.add_tensor(name, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=BF16)
