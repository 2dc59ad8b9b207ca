"""The architectures that every test of this folder runs over: between them, each way to route, publish and attend."""

CORE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_oss")

# Their prompts have a place of their own in a batch: test_encoder_decoder.py has these.
ENCODER_DECODERS = ("switch_transformers", "nllb-moe")
