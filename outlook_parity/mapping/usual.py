"""Usual names: of leaves, counters, containers and parts of models, in either framework. Imports no framework."""

import re

# Usual names of leaves in Flax, Haiku, Keras and Equinox -> PyTorch's.
LEAVES = {
    **dict.fromkeys(("kernel", "scale", "embedding", "embeddings", "gamma", "w", "g"), "weight"),
    **dict.fromkeys(("beta", "b", "offset"), "bias"),
    **dict.fromkeys(("mean", "moving_mean"), "running_mean"),
    **dict.fromkeys(("var", "moving_variance", "moving_var"), "running_var"),
}

# What stands between a module and its counterpart and means nothing.
NOTHING = ("~", "")

# Names of the same part of a model; every list belongs to one part.
SAME = (
    ("layer", "block", "module", "stage", "item", "cell", "resblock", "h", "group", "hidden_layer"),
    ("query", "q", "q_proj", "to_q", "wq", "q_lin", "query_proj", "q_linear", "linear_q"),
    ("key", "k", "k_proj", "to_k", "wk", "k_lin", "key_proj", "k_linear", "linear_k"),
    ("value", "v", "v_proj", "to_v", "wv", "v_lin", "value_proj", "v_linear", "linear_v"),
    ("qkv", "in_proj", "c_attn", "query_key_value", "to_qkv", "wqkv", "qkv_proj", "attn_qkv"),
    ("kv", "key_value", "to_kv", "wkv", "kv_proj"),
    ("out", "o", "out_proj", "o_proj", "to_out", "proj", "wo", "out_lin", "attn_out", "output", "output_proj"),
    ("gate", "gate_proj", "w_gate"),
    ("up", "up_proj", "w_up"),
    ("down", "down_proj", "w_down"),
    ("gate_up", "gate_up_proj"),
    ("attention", "attn", "self_attn", "self_attention", "mha", "multi_head_attention", "attention_layer"),
    ("cross_attention", "cross_attn", "encoder_attn"),
    ("mlp", "ffn", "feed_forward", "ff", "feedforward", "mlp_block"),
    ("norm", "ln", "layernorm", "layer_norm", "rms_norm", "rmsnorm", "batch_norm", "bn", "group_norm"),
    ("dense", "linear", "fc", "lin"),
    ("conv", "convolution", "conv2d", "conv1d", "conv3d", "conv_layer"),
    ("embedding", "embed", "emb", "embeddings", "embedder"),
    ("token_embedding", "wte", "tok_emb", "embed_tokens", "word_embeddings", "tok_embeddings", "token_embed"),
    ("position_embedding", "wpe", "pos_emb", "pos_embed", "position_embeddings", "pos_embedding", "global_pos_embed"),
    ("cls_token", "cls", "class_token", "class_embedding"),
    ("head", "classifier", "lm_head", "logits", "fc_out"),
    ("downsample", "shortcut", "skip", "downsampling"),
    ("patch_embed", "patch_embedding", "patch_embeddings", "patchify"),
    ("encoder", "enc"),
    ("decoder", "dec"),
)  # fmt: skip

# One projection that is several, in the order of its parts.
FUSED = {"qkv": ("query", "key", "value"), "kv": ("key", "value"), "gate_up": ("gate", "up")}

_PART = {name: names[0] for names in SAME for name in names}


def leaf_name(leaf: str) -> str:
    """Return PyTorch's usual name of a leaf."""
    return LEAVES.get(leaf, leaf)


def tidy(token: str) -> str:
    """Return a step of a path in lower case, with underscores, without Flax's prefix of Hugging Face's classes."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", token).lower().strip("_")
    return snake.removeprefix("flax_")


def part_name(token: str) -> str:
    """Return the name of the part of a model that a step of a path names, the step itself if it is no usual one."""
    name = tidy(token)
    return _PART.get(name) or _PART.get(name.removesuffix("s")) or name


def steps_of(path: str) -> list[str]:
    """Return the steps of a weight's path: counters apart, what means nothing left out, its own name last.

    For example "blocks_0/~/mlp.kernel" gives blocks, 0, mlp, kernel; PyTorch's parametrized weight_norm the names
    weight_g and weight_v of old.
    """
    path = re.sub(r"parametrizations\.(\w+)\.original([01]?)$", _parametrized, path)
    *owner, leaf = (step for step in re.split(r"[./]", path) if step not in NOTHING)
    steps: list[str] = []
    for step in owner:
        counters: list[str] = []
        while counted := re.fullmatch(r"(.*\d(?=_)|.*[^\d_])_?(\d+)", step):
            step, counter = counted.groups()
            counters.insert(0, counter)
        steps += [step, *counters]
    return [*steps, leaf]


def _parametrized(match: re.Match[str]) -> str:
    name, which = match.groups()
    return name + {"0": "_g", "1": "_v", "": ""}[which]
