"""The small models whose outputs and gradients are kept in golden.npz.

Weights and inputs come from `model_cases.numbers`, a formula, and are not stored.
"""

UNET = {
    "in_channels": 4,
    "out_channels": 3,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 12],
    "layers_per_block": [1, 2],
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
    "num_class_embeds": 3,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 3,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 12],
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 12,
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 7,
}
SAMPLER_STEPS = (2, 5, 20)
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")

# The gradients that are stored: of the inputs, and of weights at both ends and in the middle.
UNET_GRADIENTS = [
    "x",
    "context",
    "time_embedding.linear_1.weight",
    "class_embedding.weight",
    "add_embedding.pool.positional_embedding",
    "conv_in.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.bias",
    "down_blocks.0.downsamplers.0.conv.bias",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
    "up_blocks.0.resnets.2.conv_shortcut.bias",
    "up_blocks.1.resnets.0.norm1.weight",
    "conv_out.weight",
]
ENCODER_GRADIENTS = [
    "x",
    "encoder.conv_in.weight",
    "encoder.down_blocks.0.downsamplers.0.conv.bias",
    "encoder.mid_block.attentions.0.to_v.weight",
    "quant_conv.weight",
]
DECODER_GRADIENTS = [
    "x",
    "post_quant_conv.weight",
    "decoder.mid_block.attentions.0.group_norm.weight",
    "decoder.up_blocks.0.upsamplers.0.conv.bias",
    "decoder.conv_out.weight",
]
TEXT_GRADIENTS = [
    "text_model.embeddings.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight",
    "text_model.encoder.layers.0.self_attn.k_proj.weight",
    "text_model.encoder.layers.1.mlp.fc1.weight",
    "text_model.final_layer_norm.bias",
]
