"""The weight table of one `OutlookAttention` layer."""

from outlook_common.config import OutlookAttentionConfig
from outlook_common.weights.tables.base import WeightTable, linear_entries

# The naming of External-Attention-pytorch, which calls the value projection `v_pj`.
EXTERNAL_ATTENTION = "external-attention"


def layer_table(dim: int, attn_features: int, *, qkv_bias: bool) -> WeightTable:
    """Return the table of a layer from its channels and the outputs of its `attn` projection.

    The split of `attn_features` into heads and window positions does not matter.
    """
    value_names = ("weight", "bias") if qkv_bias else ("weight",)
    return WeightTable(
        f"OutlookAttention(dim={dim}, attn_features={attn_features}, qkv_bias={qkv_bias})",
        (
            *linear_entries("v", dim, dim, bias=qkv_bias),
            *linear_entries("attn", dim, attn_features),
            *linear_entries("proj", dim, dim),
        ),
        {EXTERNAL_ATTENTION: {f"v_pj.{name}": f"v.{name}" for name in value_names}},
    )


def table_of_layer(config: OutlookAttentionConfig) -> WeightTable:
    """Return the table of the layer with this configuration."""
    return layer_table(config.dim, config.attn_features, qkv_bias=config.qkv_bias)
