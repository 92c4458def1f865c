"""What the JAX twin draws: Flax's bits, on few axes, for XLA compiles a draw in six axes ten times as long."""

from collections.abc import Iterator
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import outlook_jax
from outlook_jax.draws import draw
from outlook_jax.layers import Dropout, conv, normal
from parity_tests.support.runners import bits
from parity_tests.support.volo import small_config

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2, 9, 9), (2, 6, 7, 7), (8,), ()])
def test_dropout_is_flax_own_bit_for_bit(shape: tuple[int, ...], rate: float, dtype: str) -> None:
    x = jax.random.normal(jax.random.key(1), shape, dtype)
    ours, theirs = Dropout(rate, rngs=nnx.Rngs(0)), nnx.Dropout(rate, rngs=nnx.Rngs(0))
    for _ in range(2):  # the second call draws anew
        out = ours(x)
        assert out.dtype == x.dtype
        assert np.array_equal(out, theirs(x))
    assert np.array_equal(ours(x, rngs=nnx.Rngs(5)), theirs(x, rngs=nnx.Rngs(5)))
    assert ours(x, deterministic=True) is x


def test_dropout_keeps_a_sharding_that_is_part_of_the_type() -> None:
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", None, "model")
        x = jax.device_put(jnp.ones((2, 3, 4)), NamedSharding(mesh, spec))
        out = Dropout(0.5, rngs=nnx.Rngs(0))(x)
        assert jax.typeof(out).sharding.spec == spec
        assert np.array_equal(out, nnx.Dropout(0.5, rngs=nnx.Rngs(0))(x))


class _CountedByFlax(nnx.Rngs):
    def finish(self) -> None: ...


def test_a_model_draws_flaxs_keys_and_sets_each_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flax sets it at each draw, and for each JAX goes through all that was traced before."""
    counts: list[Any] = []
    set_value = nnx.RngCount.set_value

    def made(rngs: nnx.Rngs) -> list[Any]:
        rngs.params()  # the streams are somewhere in their middle
        counts.clear()
        model = outlook_jax.VOLO(small_config(), rngs=rngs)
        return [value[...] for _, value in nnx.to_flat_state(nnx.state((model, rngs)))]

    def count(self: Any, value: Any, **index: Any) -> None:
        counts.append(value)
        set_value(self, value, **index)

    monkeypatch.setattr(nnx.RngCount, "set_value", count)
    ours = made(nnx.Rngs(5, dropout=3))
    assert len(counts) == 2
    monkeypatch.setattr("outlook_jax.model.CountedRngs", lambda rngs: rngs)
    theirs = made(_CountedByFlax(5, dropout=3))
    assert len(counts) > 50
    assert len(ours) == len(theirs)
    assert all(map(np.array_equal, map(bits, ours), map(bits, theirs)))


def _draws(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "random_bits":
            yield tuple(equation.params["shape"])
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _draws(inner)


RATES = {"drop_rate": 0.1, "pos_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1}


@pytest.mark.parametrize("scan_layers", [True, False])
def test_training_draws_every_mask_on_one_axis(scan_layers: bool) -> None:
    config = small_config(**RATES)
    model = nnx.eval_shape(lambda: outlook_jax.VOLO(config, scan_layers=scan_layers, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def train(state: Any, images: jax.Array) -> Any:
        return nnx.merge(graph, state).forward_train(images)

    drawn = list(_draws(jax.make_jaxpr(train)(state, jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)).jaxpr))
    assert len(drawn) >= 8  # equal blocks are one loop
    assert max(map(len, drawn)) == 1


def test_initial_weights_are_drawn_on_one_axis() -> None:
    config = small_config()
    drawn = list(_draws(jax.make_jaxpr(lambda: nnx.state(outlook_jax.VOLO(config, rngs=nnx.Rngs(0))))().jaxpr))
    assert len(drawn) >= 10
    assert max(map(len, drawn)) == 1


@pytest.mark.parametrize(
    ("generator", "partitionable"), [("threefry2x32", True), ("threefry2x32", False), ("rbg", True)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_weights_are_flax_own_bit_for_bit(dtype: str, partitionable: bool, generator: str) -> None:
    with jax.threefry_partitionable(partitionable):
        key = jax.random.key(3, impl=generator)
        for shape in ((7, 3), (64, 65), (2, 3, 300, 40)):
            drawn = normal(key, shape, dtype)
            assert drawn.dtype == dtype
            assert np.array_equal(drawn, nnx.initializers.normal(0.02)(key, shape, dtype))
        layer = conv(3, 5, 4, 2, param_dtype=dtype, rngs=nnx.Rngs(key))
        bound = 48**-0.5
        expected = jax.random.uniform(nnx.Rngs(key).params(), (4, 4, 3, 5), dtype, -bound, bound)
        assert np.array_equal(layer.kernel[...], expected)


def test_draws_of_few_numbers_are_cut_from_one_that_is_compiled_once() -> None:
    asked = []

    def one(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        asked.append(shape)
        return jnp.arange(prod(shape), dtype=dtype)

    key, shapes = jax.random.key(0), ((3, 5), (4096,), (7, 7, 3, 64), (300, 300))
    drawn = [draw(one, key, shape, "float32") for shape in shapes]
    assert asked == [(4096,), (4096,), (65536,), (90000,)]
    for numbers, shape in zip(drawn, shapes, strict=True):
        assert np.array_equal(numbers, jnp.arange(prod(shape), dtype="float32").reshape(shape))
