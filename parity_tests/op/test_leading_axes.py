"""No batch axis, or several: as one, in both twins, for the op and for the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from torch.fx.experimental.proxy_tensor import make_fx

import outlook_jax
import outlook_torch
from outlook_common.op_cases import BY_NAME
from outlook_jax.ops import IMPLEMENTATIONS as JAX_IMPLEMENTATIONS
from outlook_torch.ops import IMPLEMENTATIONS as TORCH_IMPLEMENTATIONS
from parity_tests.support import oracle
from parity_tests.support.oracle import with_leading
from parity_tests.support.runners import IMPLEMENTATIONS, draw, from_torch, layer_pair, relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")

Array = np.ndarray

CASE = BY_NAME["stride_not_dividing"]
LEADING = ((), (6,), (2, 3), (3, 1, 2), (1, 1, 1))


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize(("framework", "implementation"), IMPLEMENTATIONS)
def test_the_op_takes_any_leading_axes(framework: str, implementation: str, leading: tuple[int, ...]) -> None:
    case = CASE.with_batch(int(np.prod(leading)))
    flat = draw(case, 3, dropout=0.2)
    expected = oracle.attend(flat, case.grid)
    found = IMPLEMENTATIONS[framework, implementation](with_leading(flat, leading), case, implementation=implementation)
    for name, bound in (("out", 1e-12), ("d_value", 1e-10), ("d_logits", 1e-10)):
        result = getattr(found, name)
        assert result.shape[: len(leading)] == leading
        assert result.ndim == len(leading) + getattr(expected, name).ndim - 1
        assert relative_error(result.reshape(getattr(expected, name).shape), getattr(expected, name)) <= bound


@pytest.mark.parametrize("implementation", ["reference", "composite"])
def test_vmap_of_the_op_without_a_batch_axis_is_the_op_of_a_batch(implementation: str) -> None:
    operands = draw(CASE.with_batch(3), 4)
    expected = oracle.attend(operands, CASE.grid).out
    options = {**CASE.window, "implementation": implementation}
    ours = torch.func.vmap(lambda v, logits: outlook_torch.outlook_attention(v, logits, **options))(
        torch.tensor(operands.value), torch.tensor(operands.logits)
    )
    theirs = jax.vmap(lambda v, logits: outlook_jax.outlook_attention(v, logits, **options))(
        jnp.asarray(operands.value), jnp.asarray(operands.logits)
    )
    assert relative_error(from_torch(ours), expected) <= 1e-12
    assert relative_error(np.asarray(theirs), expected) <= 1e-12


@pytest.mark.parametrize("implementation", ["reference", "composite"])
def test_with_one_batch_axis_the_programs_are_those_of_the_implementation(implementation: str) -> None:
    operands = draw(CASE, 5)

    def lowered(op: object) -> str:
        def program(value: jax.Array, logits: jax.Array) -> jax.Array:
            return op(value, logits)

        return jax.jit(program).lower(operands.value, operands.logits).as_text()

    def traced(op: object) -> str:
        return make_fx(lambda v, logits: op(v, logits))(
            torch.tensor(operands.value), torch.tensor(operands.logits)
        ).code

    options = {**CASE.window, "implementation": implementation}
    jax_run, torch_run = JAX_IMPLEMENTATIONS[implementation].run, TORCH_IMPLEMENTATIONS[implementation].run
    assert lowered(lambda v, logits: outlook_jax.outlook_attention(v, logits, **options)) == lowered(
        lambda v, logits: jax_run(v, logits, None, CASE.grid)
    )
    assert traced(lambda v, logits: outlook_torch.outlook_attention(v, logits, **options)) == traced(
        lambda v, logits: torch_run(v, logits, None, CASE.grid)
    )


def test_an_explicitly_sharded_axis_among_several() -> None:
    mesh = jax.make_mesh((1,), ("data",))
    operands = with_leading(draw(CASE.with_batch(6), 6), (2, 3))
    expected = outlook_jax.outlook_attention(jnp.asarray(operands.value), jnp.asarray(operands.logits), **CASE.window)
    with jax.set_mesh(mesh):
        value, logits = (jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in operands[:2])
        out = jax.jit(lambda v, logits: outlook_jax.outlook_attention(v, logits, **CASE.window))(value, logits)
    assert jax.typeof(out).sharding.spec[0] == "data"
    assert relative_error(np.asarray(out), np.asarray(expected)) <= 1e-12


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_layer_takes_any_leading_axes(leading: tuple[int, ...], stride: int) -> None:
    torch_layer, jax_layer = layer_pair(12, 3, stride=stride, attn_drop=0.2)
    rng, batch = np.random.default_rng(7), int(np.prod(leading))
    x = rng.standard_normal((batch, 5, 4, 12))
    grid = -(-5 // stride), -(-4 // stride)
    masks = {
        "dropout_mask": (rng.random((batch, *grid, 3, 9, 9)) > 0.2) / 0.8,
        "proj_dropout_mask": (rng.random(x.shape) > 0.2) / 0.8,
    }
    shaped = {name: mask.reshape(*leading, *mask.shape[1:]) for name, mask in masks.items()}
    expected = from_torch(torch_layer(torch.tensor(x), **{name: torch.tensor(mask) for name, mask in masks.items()}))
    x = x.reshape(*leading, *x.shape[1:])
    ours = from_torch(torch_layer(torch.tensor(x), **{name: torch.tensor(mask) for name, mask in shaped.items()}))
    theirs = np.asarray(nnx.jit(lambda layer, x, masks: layer(x, **masks))(jax_layer, x, shaped))
    assert ours.shape == theirs.shape == x.shape
    assert relative_error(ours.reshape(expected.shape), expected) <= 1e-12
    assert relative_error(theirs.reshape(expected.shape), expected) <= 1e-12
    # Masks drawn by themselves, and weights: of shapes alone in JAX.
    for out, weights in (
        (torch_layer(torch.tensor(x)), torch_layer.attention_weights(torch.tensor(x))),
        nnx.eval_shape(lambda layer, x: (layer(x), layer.attention_weights(x)), jax_layer, x),
    ):
        assert out.shape == x.shape
        assert weights.shape == (*leading, *grid, 3, 9, 9)
