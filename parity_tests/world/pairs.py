"""Honest pairs: models of other packages in PyTorch and in JAX, with the same weights."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

VOCABULARY, LENGTH, BATCH = 99, 7, 2


class Made(NamedTuple):
    """Both models and what they are called with, by keyword where the models have several inputs."""

    torch_model: Any
    jax_model: Any
    inputs: Any


@dataclass(frozen=True)
class Pair:
    """One honest pair.

    Attributes:
        name: of the pair, as in the tally.
        make: makes both models; nothing else is written for a pair.
        torch_axes: the order in which PyTorch takes the axes of the inputs, None for the same as JAX.
        levels: which are compared, None for all that the pair allows.
    """

    name: str
    make: Callable[[], Made]
    torch_axes: tuple[int, ...] | None = None
    levels: tuple[str, ...] | None = None


def ids(*shape: int) -> np.ndarray:
    """Return token ids, none of them special."""
    return np.random.default_rng(0).integers(5, VOCABULARY - 5, shape or (BATCH, LENGTH))


def images(size: int, *, channels_last: bool = False) -> np.ndarray:
    """Return standard normal images, NCHW as Hugging Face's Flax models take them too."""
    shape = (BATCH, size, size, 3) if channels_last else (BATCH, 3, size, size)
    return np.random.default_rng(0).standard_normal(shape)


def hugging_face(
    kind: str,
    inputs: Callable[[], dict[str, np.ndarray]],
    head: str = "Model",
    jax: dict[str, Any] | None = None,
    **config: Any,
) -> Made:
    """Return a model of transformers and its Flax port, with the port's own conversion of the weights.

    Args:
        kind: as the classes are called, "Bert".
        inputs: by keyword.
        head: what follows in the classes' names.
        jax: what the configuration of the Flax model has otherwise: a fault.
        config: of a size that runs in a second.
    """
    import transformers

    torch.manual_seed(0)
    settings, jax_settings = (getattr(transformers, f"{kind}Config")(**c) for c in (config, config | (jax or {})))
    torch_model = getattr(transformers, f"{kind}{head}")(settings)
    with torch.no_grad():
        # As initialised, matrices are so small that a model is nearly linear, and vectors are 0 and 1:
        # that hides faults.
        for parameter in torch_model.parameters():
            if parameter.ndim < 2:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    torch_model.eval()
    with tempfile.TemporaryDirectory() as folder:
        torch_model.save_pretrained(folder)
        jax_model = getattr(transformers, f"Flax{kind}{head}").from_pretrained(
            folder, from_pt=True, config=jax_settings
        )
    return Made(torch_model, jax_model, inputs())


ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
DECODER = ENCODER | {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 20,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}


def _tokens() -> dict[str, np.ndarray]:
    return {"input_ids": ids()}


def _pixels(size: int) -> Callable[[], dict[str, np.ndarray]]:
    return lambda: {"pixel_values": images(size)}


def _sequences() -> dict[str, np.ndarray]:
    return {"input_ids": ids(), "decoder_input_ids": ids(BATCH, LENGTH - 2)}


def bert(**config: Any) -> Made:
    """BERT, with its attention dropout of 0.1 that draws from a stream of its own."""
    return hugging_face("Bert", _tokens, **ENCODER | config)


def roberta(**config: Any) -> Made:
    """RoBERTa: position ids begin behind the padding id."""
    return hugging_face("Roberta", _tokens, **ENCODER | config)


def distilbert(**config: Any) -> Made:
    """DistilBERT."""
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return hugging_face("DistilBert", _tokens, **sizes | {"max_position_embeddings": 20} | config)


def electra(**config: Any) -> Made:
    """ELECTRA, told the token types: without them the port takes ones, the original zeros."""

    def inputs() -> dict[str, np.ndarray]:
        return _tokens() | {"token_type_ids": np.random.default_rng(1).integers(0, 2, (BATCH, LENGTH))}

    return hugging_face("Electra", inputs, **ENCODER | {"embedding_size": 24} | config)


def albert(**config: Any) -> Made:
    """ALBERT: layers share their weights."""
    return hugging_face("Albert", _tokens, **ENCODER | {"embedding_size": 24} | config)


def gpt2(**config: Any) -> Made:
    """GPT-2: Conv1D, whose weights are those of a transposed linear layer; GELU by tanh in both."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return hugging_face("GPT2", _tokens, **sizes | config)


def gpt_neo(**config: Any) -> Made:
    """GPT-Neo: attention without scale."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 20}
    return hugging_face("GPTNeo", _tokens, **sizes | config)


def opt(**config: Any) -> Made:
    """OPT: ReLU, learned positions with an offset of two."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 48, "max_position_embeddings": 20, "word_embed_proj_dim": 32}
    return hugging_face("OPT", _tokens, **sizes | config)


def llama(**config: Any) -> Made:
    """Llama: rotary embeddings and RMSNorm in float32, grouped keys and values."""
    return hugging_face("Llama", _tokens, **DECODER | config)


def gemma(**config: Any) -> Made:
    """Gemma: RMSNorm with 1 + weight, scaled embeddings."""
    return hugging_face(
        "Gemma", _tokens, **DECODER | {"head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"} | config
    )


def mistral(**config: Any) -> Made:
    """Mistral, with a sliding window longer than the sequence."""
    return hugging_face("Mistral", _tokens, **DECODER | {"sliding_window": 32} | config)


def t5(**config: Any) -> Made:
    """T5: relative position biases, RMSNorm, tied embeddings; no dropout, which the port's cross-attention lacks."""
    _restore_names_of_clip()
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    return hugging_face("T5", _sequences, **sizes | config)


def _restore_names_of_clip() -> None:
    """Give transformers' Flax T5 the `jnp.clip(x, a_max=...)` that JAX 0.10 no longer has."""
    import jax.numpy as jnp
    from transformers.models.t5 import modeling_flax_t5

    class Names:
        def __getattr__(self, name: str) -> Any:
            return getattr(jnp, name)

        def clip(self, x: Any, a_min: Any = None, a_max: Any = None) -> Any:
            return jnp.clip(x, a_min, a_max)

    modeling_flax_t5.jnp = Names()


def bart(**config: Any) -> Made:
    """BART."""
    return hugging_face("Bart", _sequences, **SEQ2SEQ | config)


def whisper(**config: Any) -> Made:
    """Whisper: the encoder's positions are frozen."""
    sizes = SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 15, "max_target_positions": 20}
    sizes |= {"suppress_tokens": [], "begin_suppress_tokens": [], "bos_token_id": 1, "eos_token_id": 2}

    def inputs() -> dict[str, np.ndarray]:
        features = np.random.default_rng(0).standard_normal((BATCH, 8, 30))
        return {"input_features": features, "decoder_input_ids": ids()}

    del sizes["max_position_embeddings"]
    return hugging_face("Whisper", inputs, **sizes | config)


def wav2vec2(**config: Any) -> Made:
    """Wav2Vec2: outputs are a mapping in one twin and a tuple in the other.

    In training the port's layers neither drop nor are left out, nor is anything masked: so it is in the original.
    """
    sizes = dict.fromkeys(("layerdrop", "hidden_dropout", "attention_dropout", "activation_dropout"), 0.0)
    sizes |= {"apply_spec_augment": False, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "num_conv_pos_embeddings": 4}
    sizes |= {"conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (2, 2)}
    sizes |= {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True}

    def inputs() -> dict[str, np.ndarray]:
        return {"input_values": np.random.default_rng(0).standard_normal((BATCH, 200))}

    return hugging_face("Wav2Vec2", inputs, **sizes | {"vocab_size": VOCABULARY} | config)


def vit(**config: Any) -> Made:
    """ViT."""
    return hugging_face("ViT", _pixels(24), **VISION | config)


def beit(**config: Any) -> Made:
    """BEiT: relative position biases, layer scale."""
    return hugging_face("Beit", _pixels(24), **VISION | {"use_relative_position_bias": True} | config)


def dinov2(**config: Any) -> Made:
    """DINOv2: a mask token that nothing uses; no honest pair, since the port resizes positions in a way of its own."""
    return hugging_face("Dinov2", _pixels(24), **VISION | config)


CLIP_TEXT = ENCODER | {"max_position_embeddings": LENGTH, "projection_dim": 16, "eos_token_id": VOCABULARY - 1}
CLIP_VISION = VISION | {"projection_dim": 16}


def clip(**config: Any) -> Made:
    """CLIP: two towers, images and texts."""

    def inputs() -> dict[str, np.ndarray]:
        tokens = ids()
        tokens[:, -1] = VOCABULARY - 1
        return {"input_ids": tokens, "pixel_values": images(24)}

    sizes = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 16}
    return hugging_face("CLIP", inputs, **sizes | config)


RESIDUAL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def resnet(**config: Any) -> Made:
    """ResNet: BatchNorm."""
    return hugging_face("ResNet", _pixels(32), **RESIDUAL | {"layer_type": "bottleneck"} | config)


def regnet(**config: Any) -> Made:
    """RegNet: grouped convolutions, squeeze and excitation."""
    return hugging_face("RegNet", _pixels(32), **RESIDUAL | {"groups_width": 4, "layer_type": "y"} | config)


PAIRS = tuple(
    Pair(make.__name__, make)
    for make in (
        bert,
        roberta,
        distilbert,
        electra,
        albert,
        gpt2,
        gpt_neo,
        opt,
        llama,
        gemma,
        mistral,
        t5,
        bart,
        whisper,
        wav2vec2,
        vit,
        beit,
        clip,
    )
) + tuple(
    # In training they differ: Flax keeps the biased variance, and RegNet's layers stay in eval mode.
    Pair(make.__name__, make, levels=("forward", "layers", "gradients"))
    for make in (resnet, regnet)
)
