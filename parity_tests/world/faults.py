"""Historical faults of ports, planted into the honest pairs, and faults that released ports have."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager as Context
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from parity_tests.world import pairs
from parity_tests.world.pairs import Made


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: in the tally.
        make: makes the faulty pair.
        place: what the path of the first divergence must contain, one of these.
        cause: what the cause must say, one of these, in any case of letters.
        during: what must be entered while the pair is made and verified.
        levels: which levels show it.
    """

    name: str
    make: Callable[[], Made]
    place: tuple[str, ...]
    cause: tuple[str, ...]
    during: Callable[[], Context[Any]] = nullcontext
    levels: tuple[str, ...] = ("forward", "layers")

    def __str__(self) -> str:
        return self.name


def _jax(make: Callable[..., Made], **config: Any) -> Callable[[], Made]:
    """Return a pair whose JAX model is configured otherwise."""
    return lambda: make(jax=config)


def _patched(module: str, name: str, replacement: Callable[[Any], Any]) -> Callable[[], Context[Any]]:
    """Return a context in which `name` of a module of transformers is `replacement` of what it was."""

    @contextmanager
    def patched() -> Iterator[None]:
        home = import_module(f"transformers.models.{module}")
        *owner, leaf = name.split(".")
        for part in owner:
            home = getattr(home, part)
        honest = getattr(home, leaf)
        setattr(home, leaf, replacement(honest))
        try:
            yield
        finally:
            setattr(home, leaf, honest)

    return patched


def _interleaved(honest: Any) -> Any:
    import jax.numpy as jnp

    return lambda x: jnp.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)


def _tiled(honest: Any) -> Any:
    """Let `jnp.repeat` of keys and values be `jnp.tile`: head h then reads group h % groups, not h // repeats."""
    import jax.numpy as jnp

    class Names:
        def __getattr__(self, name: str) -> Any:
            return getattr(jnp, name)

        def repeat(self, x: Any, repeats: int, axis: int) -> Any:
            return jnp.concatenate([x] * repeats, axis=axis)

    return Names()


def _unscaled(honest: Any) -> Any:
    def attention(query: Any, key: Any, **kwargs: Any) -> Any:
        return honest(query * query.shape[-1] ** 0.5, key, **kwargs)

    return attention


def _without_weight_offset(honest: Any) -> Any:
    import jax
    import jax.numpy as jnp
    from flax.linen.module import wrap_method_once  # as Linen does with a class's own methods

    def call(self: Any, x: Any) -> Any:
        variance = jnp.square(jnp.asarray(x, jnp.float32)).mean(-1, keepdims=True)
        return self.weight * jnp.asarray(x * jax.lax.rsqrt(variance + self.epsilon), self.dtype)

    return wrap_method_once(call)


def _later(honest: Any) -> Any:
    """Count positions from one."""

    def call(self: Any, input_ids: Any, token_type_ids: Any, position_ids: Any, *rest: Any, **kwargs: Any) -> Any:
        return honest(self, input_ids, token_type_ids, position_ids + 1, *rest, **kwargs)

    return call


def _changed(make: Callable[..., Made], change: Callable[[dict[str, Any]], None]) -> Callable[[], Made]:
    """Return a pair whose Flax parameters, a flat dictionary by path, `change` has changed."""

    def made() -> Made:
        from flax.traverse_util import flatten_dict, unflatten_dict

        pair = make()
        flat = flatten_dict(pair.jax_model.params, sep="/")
        change(flat)
        pair.jax_model.params = unflatten_dict(flat, sep="/")
        return pair

    return made


def _exchange(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(flat: dict[str, Any]) -> None:
        flat[one], flat[other] = flat[other], flat[one]

    return change


def _replace(name: str, by: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(flat: dict[str, Any]) -> None:
        flat[name] = by(flat[name])

    return change


_BERT = "bert.modeling_flax_bert"
_LLAMA = "llama.modeling_flax_llama"
_LAYER = "encoder/layer/{}/attention/self/{}/kernel"

FAULTS = (
    Fault("bert: GELU by tanh", _jax(pairs.bert, hidden_act="gelu_new"), ("layer.0.intermediate",), ("gelu",)),
    Fault("bert: eps of LayerNorm", _jax(pairs.bert, layer_norm_eps=1e-3), ("embeddings.LayerNorm",), ("eps",)),
    Fault(
        "bert: another number of heads",
        _jax(pairs.bert, num_attention_heads=2),
        ("layer.0.attention.self",),
        ("channels per head",),
    ),
    Fault("vit: GELU by tanh", _jax(pairs.vit, hidden_act="gelu_new"), ("layer.0.intermediate",), ("gelu",)),
    Fault("vit: eps of LayerNorm", _jax(pairs.vit, layer_norm_eps=1e-5), ("layer.0.layernorm_before",), ("eps",)),
    Fault(
        "llama: base of RoPE (the port ignores it)",
        lambda: pairs.llama(rope_theta=5e5),
        ("rotary", "layers.0.self_attn"),
        ("base", "theta"),
    ),
    Fault("llama: eps of RMSNorm", _jax(pairs.llama, rms_norm_eps=1e-3), ("layers.0.input_layernorm",), ("eps",)),
    Fault("llama: SiLU for GELU", _jax(pairs.llama, hidden_act="gelu"), ("layers.0.mlp",), ("gelu", "silu")),
    Fault(
        "gemma: GELU exact",
        _jax(pairs.gemma, hidden_activation="gelu"),
        ("layers.0.mlp",),
        ("gelu",),
    ),
    Fault("gpt2: GELU exact", _jax(pairs.gpt2, activation_function="gelu"), ("h.0.mlp",), ("gelu",)),
    Fault("opt: GELU for ReLU", _jax(pairs.opt, activation_function="gelu"), ("layers.0",), ("gelu", "relu")),
    Fault("bart: ReLU for GELU", _jax(pairs.bart, activation_function="relu"), ("layers.0",), ("gelu", "relu")),
    Fault(
        "bart: embeddings scaled",
        _jax(pairs.bart, scale_embedding=True),
        ("encoder",),
        ("multiplies by 5.6569",),
    ),
    Fault("roberta: padding id", _jax(pairs.roberta, pad_token_id=3), ("embeddings",), ("position",)),
    Fault(
        "clip: GELU for quick GELU",
        _jax(pairs.clip, text_config=pairs.CLIP_TEXT | {"hidden_act": "gelu"}),
        ("layers.0.mlp",),
        ("gelu",),
    ),
    Fault("dinov2: eps of LayerNorm", _jax(pairs.dinov2, layer_norm_eps=1e-4), ("layer.0.norm1",), ("eps",)),
    Fault("beit: GELU by tanh", _jax(pairs.beit, hidden_act="gelu_new"), ("layer.0.intermediate",), ("gelu",)),
    Fault("whisper: GELU by tanh", _jax(pairs.whisper, activation_function="gelu_new"), ("encoder",), ("gelu",)),
    Fault("albert: GELU exact", _jax(pairs.albert, hidden_act="gelu"), ("albert_layer",), ("gelu",)),
    Fault("resnet: SiLU for ReLU", _jax(pairs.resnet, hidden_act="silu"), ("embedder",), ("silu", "relu")),
    Fault(
        "llama: RoPE interleaved",
        pairs.llama,
        ("layers.0.self_attn",),
        ("interleav", "rotat", "layout"),
        _patched(_LLAMA, "rotate_half", _interleaved),
    ),
    Fault(
        "llama: keys tiled, not repeated",
        pairs.llama,
        ("layers.0.self_attn",),
        ("order", "repeat", "tile"),
        _patched(_LLAMA, "jnp", _tiled),
    ),
    Fault(
        "bert: attention without scale",
        pairs.bert,
        ("layer.0.attention.self",),
        ("scale", "factor"),
        _patched(_BERT, "dot_product_attention_weights", _unscaled),
    ),
    Fault(
        "gemma: RMSNorm without 1 +",
        pairs.gemma,
        ("layers.0.input_layernorm",),
        ("weight", "offset", "1 +"),
        _patched("gemma.modeling_flax_gemma", "FlaxGemmaRMSNorm.__call__", _without_weight_offset),
    ),
    Fault(
        "bert: positions from one",
        pairs.bert,
        ("embeddings",),
        ("position",),
        _patched(_BERT, "FlaxBertEmbeddings.__call__", _later),
    ),
    Fault(
        "bert: query and key exchanged",
        _changed(pairs.bert, _exchange(_LAYER.format(0, "query"), _LAYER.format(0, "key"))),
        ("layer.0.attention.self",),
        ("exchanged", "equals", "the numbers of", "key"),
    ),
    Fault(
        "vit: kernel not transposed",
        _changed(pairs.vit, _replace("encoder/layer/1/attention/attention/query/kernel", lambda x: x.T)),
        ("layer.1.attention.attention.query",),
        ("transposed",),
    ),
    Fault(
        "bert: weights of two layers exchanged",
        _changed(pairs.bert, _exchange(_LAYER.format(0, "value"), _LAYER.format(1, "value"))),
        ("layer.0.attention.self.value",),
        ("exchanged", "layer.1"),
    ),
    Fault(
        "vit: a bias lost",
        _changed(pairs.vit, _replace("encoder/layer/0/output/dense/bias", lambda x: 0 * x)),
        ("layer.0.output.dense",),
        ("zero", "bias"),
    ),
    Fault(
        "mistral: sliding window one longer (released)",
        lambda: pairs.mistral(sliding_window=4),
        ("layers.0.self_attn",),
        ("mask", "window"),
    ),
    Fault(
        "electra: token types of one (released)",
        lambda: pairs.electra()._replace(inputs={"input_ids": pairs.ids()}),
        ("embeddings",),
        ("other integers",),
    ),
    Fault(
        "t5: cross-attention never drops (released)",
        lambda: pairs.t5(dropout_rate=0.1),
        ("decoder.block.0.layer.1.EncDecAttention",),
        ("24 dropout masks in torch, 22 in jax",),
        levels=("training",),
    ),
    Fault(
        "wav2vec2: layers never drop (released)",
        lambda: pairs.wav2vec2(attention_dropout=0.1, hidden_dropout=0.1),
        ("encoder.layers.0",),
        ("dropout masks in torch, 1 in jax",),
        levels=("training",),
    ),
    Fault(
        "regnet: layers stay in eval mode (released)",
        pairs.regnet,
        ("encoder.stages.0.layers.0.layer.0.normalization",),
        ("as in eval mode",),
        levels=("training",),
    ),
    Fault(
        "resnet: biased running variance (released)",
        pairs.resnet,
        ("normalization",),
        ("biased",),
        levels=("training",),
    ),
    Fault("dinov2: positions resized otherwise (released)", pairs.dinov2, ("embeddings",), ("interpolation",)),
    Fault(
        "resnet: basic layers (released)",
        lambda: pairs.resnet(layer_type="basic"),
        ("encoder", "embedder"),
        ("weight", "counterpart", "missing"),
    ),
)
