"""The architectures that tests of the model and of synthetic checkpoints run over.

Together they cover every kind of gate, layout and attention.
"""

CORE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss")

# Tested in `tests/unit/model/trunk/test_encoder_decoder.py`, because a batch carries their prompts separately.
ENCODER_DECODERS = ("switch_transformers", "nllb-moe")
