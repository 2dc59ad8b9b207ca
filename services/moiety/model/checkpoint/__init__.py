"""Checkpoint folders: config, safetensors headers, tensors, revision and tokenizer."""
