"""What works with JAX and Flax alone: op, layer, VOLO, weights, training."""

from functools import partial
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import outlook_jax
from outlook_common.op_cases import CASES
from outlook_jax import linen
from parity_tests.support.oracle import Operands, attend

jax.config.update("jax_enable_x64", True)
draw = np.random.default_rng(0).standard_normal

# The op: every implementation, in float64, against the formula in NumPy.
for case in CASES:
    if np.prod(case.logits_shape) > 10**6:
        continue
    operands = Operands(draw(case.value_shape), 2 * draw(case.logits_shape), draw(case.value_shape))
    truth = attend(operands, case.grid)
    for implementation in (None, "composite", "reference"):
        op = partial(outlook_jax.outlook_attention, **case.window, implementation=implementation)
        out, gradients = jax.vjp(jax.jit(op), jnp.asarray(operands.value), jnp.asarray(operands.logits))
        results = (out, *gradients(jnp.asarray(operands.cotangent)))
        for result, exact, bound in zip(results, truth, (1e-12, 1e-10, 1e-10), strict=True):
            assert np.abs(result - exact).max() <= bound * np.abs(exact).max(), (case.name, implementation)

# The layer, as Flax NNX and as Linen, shares its weights through a file.
layer = outlook_jax.OutlookAttention(24, 2, rngs=nnx.Rngs(0))
layer.eval()
x = jnp.asarray(draw((2, 9, 7, 24)), jnp.float32)
outlook_jax.save_weights(layer, "layer.safetensors")
other = outlook_jax.OutlookAttention(24, 2, rngs=nnx.Rngs(1))
other.eval()
outlook_jax.load_weights(other, "layer.safetensors")
np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(layer, x), nnx.jit(lambda m, x: m(x))(other, x))
module = linen.OutlookAttention(24, 2)
streams = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
assert module.apply(module.init(streams, x), x, rngs=streams).shape == x.shape

# A small VOLO makes steps, and goes on from a file.
model = outlook_jax.volo(
    "volo_d1_224",
    layers=(1, 1, 1, 1),
    embed_dims=(24, 48, 48, 48),
    num_heads=(2, 4, 4, 4),
    img_size=64,
    num_classes=5,
    rngs=nnx.Rngs(0),
)
optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
images, labels = jnp.asarray(draw((2, 64, 64, 3)), jnp.float32), jnp.asarray([1, 2])


@nnx.jit
def step(model: outlook_jax.VOLO, optimizer: nnx.Optimizer) -> jax.Array:
    def loss(model: outlook_jax.VOLO) -> jax.Array:
        logits, aux, _ = model.forward_train(images)
        aux_loss = optax.softmax_cross_entropy_with_integer_labels(
            aux, jnp.broadcast_to(labels[:, None], aux.shape[:2])
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + 0.5 * aux_loss.mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


losses = [float(step(model, optimizer)) for _ in range(3)]
assert np.isfinite(losses).all()
for name in ("training.safetensors", "training.orbax"):
    outlook_jax.save_training(model, optimizer, name)
    assert outlook_jax.load_training(model, optimizer, name) == 3

if find_spec("torch") is None:
    try:
        import outlook_torch
    except ImportError as error:
        assert "outlook-attention[torch]" in str(error)  # noqa: PT017 - this is no test module
    else:
        raise AssertionError(f"{outlook_torch} needs PyTorch")
