"""Names of tensors and settings in Hugging Face directories, beside the core's: tables, no code paths."""

from __future__ import annotations

from tfcli.config import ModelConfig

# Hugging Face's Qwen3ForCausalLM -> tfcli.model.transformer.Transformer; {} is the layer.
QWEN3_OUTER = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
QWEN3_LAYER = {
    "model.layers.{}.input_layernorm.weight": "blocks.{}.attention_norm.weight",
    "model.layers.{}.self_attn.q_proj.weight": "blocks.{}.attention.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "blocks.{}.attention.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "blocks.{}.attention.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "blocks.{}.attention.o.weight",
    "model.layers.{}.self_attn.q_norm.weight": "blocks.{}.attention.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "blocks.{}.attention.k_norm.weight",
    "model.layers.{}.post_attention_layernorm.weight": "blocks.{}.ffn_norm.weight",
    "model.layers.{}.mlp.gate_proj.weight": "blocks.{}.ffn.gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "blocks.{}.ffn.up.weight",
    "model.layers.{}.mlp.down_proj.weight": "blocks.{}.ffn.down.weight",
}

# Settings of config.json that are a field of ModelConfig under another name.
QWEN3_CONFIG = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "ffn_width",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied",
}

# Settings that the core has one value for; another value is refused, never ignored.
QWEN3_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}


def qwen3(config: ModelConfig) -> dict[str, str]:
    """{Qwen3ForCausalLM's name: the core's name} of every tensor that a file of this model holds.

    A tied head is the embedding and has no entry of its own.
    """
    names = {theirs: ours for theirs, ours in QWEN3_OUTER.items() if not (config.tied and ours == "head.weight")}
    for layer in range(config.depth):
        names |= {theirs.format(layer): ours.format(layer) for theirs, ours in QWEN3_LAYER.items()}
    return names
