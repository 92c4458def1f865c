"""The JAX twin where JAX refuses implicit promotion of dtypes and of ranks: op, layer and model."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import outlook_jax
from outlook_jax import losses
from outlook_jax.layers import LayerNorm
from parity_tests.support.volo import small_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

DTYPES = ("float16", "bfloat16", "float32", "float64")
RATES = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}
PLATFORMS = ("cpu", "cuda", "tpu")

Shape = jax.ShapeDtypeStruct


@pytest.fixture(autouse=True)
def _nothing_implicit() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def lower(function: Any, *operands: Any, platforms: tuple[str, ...] = ("cpu",)) -> None:
    """Trace and lower, which promotes whatever is promoted; what compiles it knows no promotion."""
    jax.jit(function).trace(*operands).lower(lowering_platforms=platforms)


@pytest.mark.parametrize("implementation", ["reference", "composite"])
@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_op_in_any_mixture_of_dtypes(dtype: str, logits_dtype: str, implementation: str) -> None:
    value, logits = Shape((2, 5, 6, 2, 3), dtype), Shape((2, 3, 3, 2, 9, 9), logits_dtype)
    mask = Shape(logits.shape, "float32")

    def loss(value: jax.Array, logits: jax.Array, mask: jax.Array) -> jax.Array:
        out = outlook_jax.outlook_attention(value, logits, stride=2, dropout_mask=mask, implementation=implementation)
        assert out.dtype == value.dtype
        return out.sum()

    lower(jax.grad(loss, argnums=(0, 1)), value, logits, mask, platforms=PLATFORMS)


def gradients(model: nnx.Module) -> Any:
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def loss(parameters: Any, rest: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        model = nnx.merge(graph, parameters, rest, copy=True)  # its statistics change inside of a gradient
        if not isinstance(model, outlook_jax.VOLO):
            return model(x).sum()
        return losses.TokenLabelCrossEntropy()(model.forward_train(x), target)

    return jax.grad(loss), parameters, rest


@pytest.mark.parametrize("param_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_the_layer_in_training_and_not(stride: Any, dtype: str, param_dtype: str | None) -> None:
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype, "qkv_bias": True, "stride": stride}
    layer = nnx.eval_shape(lambda: outlook_jax.OutlookAttention(12, 3, **options, rngs=nnx.Rngs(0)))
    x = Shape((2, 7, 5, 12), dtype)
    for mode in (layer.train, layer.eval):
        mode()
        lower(*gradients(layer), x, None)


@pytest.mark.parametrize("param_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_volo_in_training_and_not(dtype: str, param_dtype: str | None) -> None:
    config = small_config(**RATES, dynamic_img_size=True)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype or dtype}
    model = nnx.eval_shape(lambda: outlook_jax.VOLO(config, **options, rngs=nnx.Rngs(0)))
    images, target = Shape((2, 48, 32, 3), dtype), Shape((2, 7, 2 + 12 * 8 // 4), dtype)
    lower(*gradients(model), images, target)

    model.eval()
    graph, state = nnx.split(model)
    lower(lambda state, images: nnx.merge(graph, state)(images), state, images)
    lower(lambda state: nnx.state(outlook_jax.fold_batch_norm(nnx.merge(graph, state))), state)


@pytest.mark.parametrize("loss", [losses.TokenLabelCrossEntropy(), losses.TokenLabelGTCrossEntropy()])
def test_the_loss_has_the_dtype_of_its_targets(loss: Any) -> None:
    box = tuple(jnp.asarray(bound, jnp.int32) for bound in (0, 1, 2, 3))
    cls, aux, target = (jnp.ones(shape, jnp.float32) for shape in ((2, 7), (2, 12, 7), (2, 7, 14)))
    assert loss((cls, aux, box), target).dtype == jnp.float32


def test_layer_norm_is_flax_own_bit_for_bit() -> None:
    for dtype in DTYPES:
        x = jax.random.normal(jax.random.key(1), (3, 5, 24), dtype) * 3 + 1
        options = {"use_fast_variance": False, "dtype": dtype, "rngs": nnx.Rngs(0)}
        ours, theirs = LayerNorm(24, **options), nnx.LayerNorm(24, **options)
        for norm in (ours, theirs):
            norm.scale[...] = jax.random.normal(jax.random.key(2), 24, jnp.float32)
            norm.bias[...] = jax.random.normal(jax.random.key(3), 24, jnp.float32)
        out = ours(x)
        with jax.numpy_dtype_promotion("standard"):
            assert jnp.array_equal(out, theirs(x)), dtype
