"""Numbers and names that both twins use."""

# Added to the variance in every LayerNorm and BatchNorm.
NORM_EPSILON = 1e-5
# Weight of the batch in BatchNorm's running statistics: PyTorch's 0.1 is Flax's 0.9.
BATCH_NORM_MOMENTUM = 0.1
# Standard deviation of the initial linear weights, `pos_embed` and `cls_token`.
INIT_STD = 0.02

# What policies of `jax.checkpoint` call the result of the op, and of self- and class attention.
OP_CHECKPOINT_NAME = "outlook_attention"
ATTENTION_CHECKPOINT_NAME = "attention"
